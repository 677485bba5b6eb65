"""A picture's file: PNG with its whole record inside.

Three text chunks: `parameters` in the common form that galleries and prompt readers know,
`lowvram` with everything as JSON, and XMP that says the picture was made by a trained model
(IPTC DigitalSourceType).
"""

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.artifacts import canonical_json, write_bytes
from lowvram.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np

_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/'
    'trainedAlgorithmicMedia"/></rdf:RDF></x:xmpmeta>'
)


def save(path: Path, levels: "np.ndarray", record: dict[str, Any]) -> None:
    """Write one picture atomically.

    Args:
        levels: `[height, width, 3]`, uint8.
        record: how it was made: "prompt", "negative_prompt", "seed", "model" and "denoise" (the
            settings of that stage; not there for a picture that was only encoded and decoded) are
            shown in `parameters`; all of it goes into `lowvram`.

    Raises:
        StorageError: no space, or the folder cannot be written.
    """
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", _parameters(record))
    info.add_itxt("lowvram", canonical_json(record))
    info.add_itxt("XML:com.adobe.xmp", _XMP)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG", pnginfo=info)
    write_bytes(path, buffer.getvalue())


def read_record(path: Path) -> dict[str, Any]:
    """The record inside a picture.

    Raises:
        ArtifactError: not a picture, or not one of ours.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            record = json.loads(image.info["lowvram"])
    except (OSError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path} is no picture with a lowvram record ({error!r})") from None
    return dict(record)


def _parameters(record: dict[str, Any]) -> str:
    """One line of settings below the prompts; each value free of commas and newlines."""
    settings = record.get("denoise")
    model = record["model"]["name"].replace(",", " ")
    if settings is None:
        return f"Model: {model}"
    width, height = settings["requested"]
    lines = [" ".join(record["prompt"].split())]
    if record["negative_prompt"].strip():
        lines.append("Negative prompt: " + " ".join(record["negative_prompt"].split()))
    more = ""
    if "strength" in settings:  # as galleries know these two from other programs
        more += f", Denoising strength: {settings['strength']:g}"
    if "towards" in record:
        more += f", Variation seed: {record['towards']}"
        more += f", Variation seed strength: {record['at']:g}"
    lines.append(
        f"Steps: {settings['steps']}, Sampler: {settings['scheduler']}, "
        f"CFG scale: {settings['guidance_scale']}, Seed: {record['seed']}, "
        f"Size: {width}x{height}, Model: {model}{more}"
    )
    return "\n".join(lines)
