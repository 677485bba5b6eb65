"""How far pictures and latents are from another contender's."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def distance(made: Path, reference: Path) -> dict[str, Any] | None:
    """Levels of 255 and dB over all pictures of two folders, and the error of their latents.

    Names begin with the prompt's number: pictures are compared in their order.

    Returns:
        largest and mean difference of a level, PSNR in dB (None where equal), and the relative
        error of the latents (of the norm; None where either has none). None where the folders
        do not hold the same number of pictures.
    """
    ours, theirs = (sorted(folder.glob("*.png")) for folder in (made, reference))
    if not ours or len(ours) != len(theirs):
        return None
    pairs = [(_levels(one), _levels(other)) for one, other in zip(ours, theirs, strict=True)]
    if any(one.shape != other.shape for one, other in pairs):
        return None
    apart = np.stack([np.abs(one - other) for one, other in pairs])
    square = float((apart.astype(np.float64) ** 2).mean())
    return {
        "pictures": len(pairs),
        "largest": int(apart.max()),
        "mean": float(apart.mean()),
        "psnr": 10 * math.log10(255**2 / square) if square else None,
        "latents_error": _latents_error(made, reference),
    }


def _levels(path: Path) -> "np.ndarray[Any, np.dtype[np.int16]]":
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


def _latents_error(made: Path, reference: Path) -> float | None:
    paths = [folder / "latents.safetensors" for folder in (made, reference)]
    if not all(path.is_file() for path in paths):
        return None
    from safetensors.torch import load_file

    one, other = (load_file(path)["latents"].float() for path in paths)
    if one.shape != other.shape:
        return None
    return float((one - other).norm() / other.norm())
