"""How far pictures and latents are from another contender's."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open

from lowvram.compare.metrics import mean_squared_error, psnr, relative_errors


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
    square = float(np.mean([mean_squared_error(other, one) for one, other in pairs]))
    return {
        "pictures": len(pairs),
        "largest": int(apart.max()),
        "mean": float(apart.mean()),
        "psnr": psnr(square) if square else None,
        "latents_error": _latents_error(made, reference),
    }


def latents_distance(one: np.ndarray, other: np.ndarray) -> float | None:
    """The norm of the difference over that of `other`, of as many pictures as both have.

    Args:
        one, other: `[pictures, 4, height/8, width/8]`.

    Returns:
        None where they cannot be compared.
    """
    count = min(len(one), len(other))
    if one.shape[1:] != other.shape[1:] or not count:
        return None
    return float(relative_errors(other[None, :count], one[None, :count])[0])


def latents_of(path: Path) -> np.ndarray:
    """Those that a contender left in a file."""
    with safe_open(path, framework="np") as file:
        found: np.ndarray = file.get_tensor("latents")
    return found


def _levels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


def _latents_error(made: Path, reference: Path) -> float | None:
    paths = [folder / "latents.safetensors" for folder in (made, reference)]
    if not all(path.is_file() for path in paths):
        return None
    one, other = map(latents_of, paths)
    return latents_distance(one, other) if len(one) == len(other) else None
