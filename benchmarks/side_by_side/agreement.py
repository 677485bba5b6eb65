"""Whether contenders made the same: latents and pictures, before any time is believed.

Outputs are held against the first of the same size and steps whose text encoder computes in the
same precision; where that is another (8 bits, 4 bits, bfloat16, float16) the distance is told
and nothing is concluded, unless it is so far that something must be wrong.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SAME = 0.02  # of latents, root mean square of the difference to that of the latents; see below
OTHER = 0.5  # likewise, where text encoders differ in precision
LEVELS = 2.0  # of pixels, mean difference in levels of 255

# float16 has 11 bits: a rounding is 5e-4. A step rounds in each of 28 blocks, and steps add up; the
# sums of other kernels round elsewhere. What is wrong (other noise, another text) is off by 1.


@dataclass
class Agreement:
    """Remembers the first output of each kind.

    Attributes:
        first: (size, steps, precision) to latents file and picture.
    """

    first: dict[tuple[int, int, str], tuple[Path | None, Path]] = field(default_factory=dict)

    def judge(
        self, outputs: dict[str, str | None], size: int, steps: int, precision: str, blended: bool
    ) -> dict[str, Any]:
        """How far an output is from the first of its kind, and whether that is rounding.

        Args:
            precision: of the text encoder.
            blended: whether the picture was decoded in tiles, which are not equal by nature.

        Returns:
            "agrees" (None for the first of its kind), "compared_with", "latents_distance",
            "pixels_levels"; "other_distances" to outputs of other precision.
        """
        latents = outputs["latents"]
        files = (None if latents is None else Path(latents), Path(str(outputs["pixels"])))
        mine = (size, steps, precision)
        others = {
            key[2]: distances(files, found)[0]
            for key, found in self.first.items()
            if key[:2] == (size, steps) and key[2] != precision
        }
        said: dict[str, Any] = {"other_distances": others, "agrees": None}
        if mine in self.first:
            far, levels = distances(files, self.first[mine])
            said |= {"latents_distance": far, "pixels_levels": levels, "compared_with": precision}
            said["agrees"] = within(far, None if blended else levels)
        elif not blended:
            self.first[mine] = files
        if any(each is not None and not each <= OTHER for each in others.values()):
            said["agrees"] = False
        return said


def within(latents: float | None, levels: float | None) -> bool:
    """Whether distances are those of rounding; of what is not known nothing is asked."""
    return (latents is None or latents <= SAME) and (levels is None or levels <= LEVELS)


def distances(
    one: tuple[Path | None, Path], other: tuple[Path | None, Path]
) -> tuple[float | None, float | None]:
    """Of the latents (None where either has none) and of the first pictures."""
    far = None
    if one[0] is not None and other[0] is not None:
        far = latents_distance(_latents(one[0]), _latents(other[0]))
    return far, pixels_levels(_pixels(one[1]), _pixels(other[1]))


def latents_distance(one: "np.ndarray[Any, Any]", other: "np.ndarray[Any, Any]") -> float | None:
    """Root mean square of the difference over that of `other`; of as many as both have.

    Args:
        one, other: `[pictures, 4, height/8, width/8]`.
    """
    count = min(len(one), len(other))
    if one.shape[1:] != other.shape[1:] or not count:
        return None
    a, b = one[:count].astype(np.float64), other[:count].astype(np.float64)
    return float(np.sqrt(np.mean((a - b) ** 2)) / max(1e-12, np.sqrt(np.mean(b**2))))


def pixels_levels(one: "np.ndarray[Any, Any]", other: "np.ndarray[Any, Any]") -> float | None:
    """Mean absolute difference of `[height, width, 3]` in levels of 255."""
    if one.shape != other.shape:
        return None
    return float(np.mean(np.abs(one.astype(np.int16) - other.astype(np.int16))))


def _latents(path: Path) -> "np.ndarray[Any, Any]":
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        found: np.ndarray[Any, Any] = file.get_tensor("latents")
    return found


def _pixels(path: Path) -> "np.ndarray[Any, Any]":
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
