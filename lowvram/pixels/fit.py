"""From decoded pixels to exactly the size that was asked for."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def cover_size(width: int, height: int, to_width: int, to_height: int) -> tuple[int, int]:
    """The size (width, height in px) to scale a picture to so that it just covers another.

    As diffusers' `resize_and_crop_tensor` computes it, but never less than what is to be covered:
    it truncates, and where 1 px is missing its crop begins at -1 and leaves a picture 1 px wide
    or high. That is so for 2.1 % of sizes from 256 to 4096 px (benchmarks/results/sizes.json).
    """
    ratio = max(to_height / height, to_width / width)
    return max(int(width * ratio), to_width), max(int(height * ratio), to_height)


def fit(pixels: "Tensor", to_width: int, to_height: int) -> "Tensor":
    """Scale (bilinear, as diffusers does) and crop the centre.

    Args:
        pixels: `[pictures, 3, height, width]`.

    Returns:
        `[pictures, 3, to_height, to_width]`.
    """
    from torch.nn.functional import interpolate

    height, width = pixels.shape[-2:]
    if (width, height) == (to_width, to_height):
        return pixels
    scaled_width, scaled_height = cover_size(width, height, to_width, to_height)
    scaled = interpolate(
        pixels, size=(scaled_height, scaled_width), mode="bilinear", align_corners=False
    )
    left, top = (scaled_width - to_width) // 2, (scaled_height - to_height) // 2
    return scaled[..., top : top + to_height, left : left + to_width]


def widen(pixels: "Tensor", to_width: int, to_height: int) -> "Tensor":
    """Repeat the right and the lower edge until the picture has that size.

    Args:
        pixels: `[pictures, channels, height, width]`, no larger.

    Returns:
        `[pictures, channels, to_height, to_width]`.
    """
    from torch.nn.functional import pad

    height, width = pixels.shape[-2:]
    if (width, height) == (to_width, to_height):
        return pixels
    beyond = (0, to_width - width, 0, to_height - height)
    return pad(pixels, beyond, mode="replicate")


def cut(pixels: "Tensor", to_width: int, to_height: int) -> "Tensor":
    """What `widen` was given: `[…, height, width]` without what is right and below of a size."""
    return pixels[..., :to_height, :to_width]


def to_levels(pixels: "Tensor") -> "np.ndarray":
    """Pixels in [-1, 1], `[pictures, 3, height, width]`, to levels 0…255 with channels last."""
    levels = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
    return (levels * 255).round().astype("uint8")
