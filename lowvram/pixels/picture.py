"""A picture's file, whatever kind it is, as the RGB pixels that a VAE encodes.

Upright (EXIF), in sRGB (embedded profiles are applied), transparent parts on white, 16-bit greys in
8 bits; the first frame of several.
"""

import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.errors import RequestError, first_line

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations in which width and height are swapped
_ORIENTATION = 0x0112
_MOST_PIXELS = 8192 * 8192  # a sanity limit, as that of the sizes a family renders
_SMALLER = "at most 8192x8192 px are read, make it smaller first"
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError)  # what Pillow raises for broken files

log = logging.getLogger(__name__)


def read_size(path: Path) -> tuple[int, int]:
    """Width and height, px, upright. Reads little more than the head of the file (a PNG's EXIF may
    lie at its end).

    Raises:
        RequestError: not a picture that can be read, or too large.
    """
    with _opened(path, path) as image:
        width, height = image.size
        try:
            sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
        except _DAMAGED as error:
            raise _unreadable(path, error) from None
    return (height, width) if sideways else (width, height)


def read_picture(path: Path, data: bytes) -> "Image":
    """The picture in these bytes: upright, RGB, 8 bits, sRGB.

    Args:
        path: for messages.

    Raises:
        RequestError: it is damaged, too large, or of a kind that is not known here.
    """
    from PIL import ImageOps

    with _opened(path, io.BytesIO(data)) as image:
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
        except _DAMAGED as error:
            raise _unreadable(path, error) from None
    return _on_white(_in_srgb(path, _in_8_bits(path, upright)))


def pixels_of(image: "Image", size: tuple[int, int], dtype: "torch.dtype") -> "Tensor":
    """What a VAE takes, `[1, 3, height, width]` in [-1, 1], on the host.

    The picture is scaled so that it covers the size, and its centre is cut out: Lanczos, from a
    window with the size's aspect ratio, so that nothing is distorted and no side is rounded. For a
    picture of that aspect ratio it is what diffusers' `VaeImageProcessor.preprocess(image, height,
    width)` gives, bit for bit; others diffusers distorts.

    Args:
        size: width and height, px.
    """
    import numpy as np
    import torch
    from PIL import ImageOps
    from PIL.Image import Resampling

    fitted = ImageOps.fit(image, size, Resampling.LANCZOS)
    levels = np.asarray(fitted).astype(np.float32)
    levels /= 255.0
    levels *= 2.0
    levels -= 1.0
    channels_first = torch.from_numpy(levels).permute(2, 0, 1)[None]
    return channels_first.to(dtype, memory_format=torch.channels_last, copy=True)


def _opened(path: Path, source: Any) -> "Image":
    """The picture, its head read.

    Raises:
        RequestError: not a picture, or too large.
    """
    import warnings

    from PIL import Image

    try:
        with warnings.catch_warnings():  # ours is the limit that counts
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(source)
    except FileNotFoundError:
        raise RequestError(f"picture {path} does not exist: check the path") from None
    except Image.DecompressionBombError:
        raise RequestError(f"picture {path} is too large: {_SMALLER}") from None
    except _DAMAGED as error:
        raise _unreadable(path, error) from None
    if image.width * image.height > _MOST_PIXELS:
        image.close()
        raise RequestError(f"picture {path} has {image.width}x{image.height} px: {_SMALLER}")
    return image


def _in_8_bits(path: Path, image: "Image") -> "Image":
    """Of 16-bit greys the nearest of 256 levels; Pillow itself would clip them."""
    import numpy as np
    from PIL import Image

    if image.mode == "F":
        raise RequestError(f"picture {path} has floating-point pixels: save it in 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise RequestError(f"picture {path} has 32-bit pixels: save it in 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _in_srgb(path: Path, image: "Image") -> "Image":
    """The colours as its embedded profile means them; one that is broken is left aside."""
    from PIL import Image, ImageCms

    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "L", "CMYK"):
        return image
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        colours = image.convert("RGB") if alpha else image
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(colours, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        log.warning("the colour profile in %s is not used: %s", path, first_line(error))
        return image
    assert isinstance(converted, Image.Image)
    if alpha:
        converted.putalpha(alpha)
    return converted


def _on_white(image: "Image") -> "Image":
    """RGB; whatever shows through is white, not the colours that a file hides there."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    over = image.convert("RGBA")
    white = Image.new("RGBA", over.size, "white")
    return Image.alpha_composite(white, over).convert("RGB")


def _unreadable(path: Path, error: BaseException) -> RequestError:
    return RequestError(
        f"picture {path} cannot be read ({first_line(error)[:100]}): give a PNG, JPEG, WebP or TIFF"
    )
