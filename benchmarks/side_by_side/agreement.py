"""Whether contenders made the same: latents and pictures, before any time is believed.

Outputs are held against the first one of another contender, of the same size and steps, whose text
encoder computes in the same precision: no contender vouches for itself. Where the precision is
another (8 bits, 4 bits, bfloat16, float16) the distance is told and nothing is concluded, unless it
is so far that something must be wrong.
"""

import json
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.distance import latents_distance, latents_of

SAME = 0.02  # of latents, the norm of the difference to that of the latents; see below
OTHER = 0.5  # likewise, where text encoders differ in precision
LEVELS = 2.0  # of pixels, mean difference in levels of 255

# float16 has 11 bits: a rounding is 5e-4. A step rounds in each of 28 blocks, and steps add up; the
# sums of other kernels round elsewhere. What is wrong (other noise, another text) is off by 1.


Files = tuple[Path | None, Path]  # latents and picture


class Kind(NamedTuple):
    """What an output is of; `precision` is the text encoder's."""

    size: int
    steps: int
    precision: str
    contender: str


class Agreement:
    """Remembers the first output of each kind, also from one run of the benchmark to the next."""

    def __init__(self, folder: Path, device: str) -> None:
        """`folder` holds what is remembered of a device, beside the outputs."""
        self._path = folder / f"first-outputs-{device}.json"
        self._lock = threading.Lock()
        self._first: dict[Kind, Files] = {}
        if self._path.is_file():
            for *kind, latents, picture in json.loads(self._path.read_text("utf-8")):
                files = (latents and Path(latents), Path(picture))
                if all(path is None or path.is_file() for path in files):
                    self._first[Kind(*kind)] = files

    def judge(self, outputs: dict[str, str | None], mine: Kind, blended: bool) -> dict[str, Any]:
        """How far an output is from another contender's, and whether that is rounding.

        Args:
            blended: whether the picture was decoded in tiles, which are not equal by nature.

        Returns:
            "agrees" (None where no other contender was there), "compared_with" (the contender),
            "latents_distance", "pixels_levels"; "other_distances" to outputs of other precision.
        """
        latents = outputs["latents"]
        files = (None if latents is None else Path(latents), Path(str(outputs["pixels"])))
        with self._lock:
            said = self._compared(mine, files, blended)
            if said["agrees"] is False and self._first.get(mine) == files:
                del self._first[mine]  # made again, and wrong: nothing is held against it
                self._keep()
            elif mine not in self._first and not blended and said["agrees"] is not False:
                self._first[mine] = files
                self._keep()
        return said

    def _compared(self, mine: Kind, files: Files, blended: bool) -> dict[str, Any]:
        others: dict[str, float | None] = {}  # to the first of each precision
        said: dict[str, Any] = {"other_distances": others, "agrees": None}
        for kind, found in self._first.items():
            if kind.contender == mine.contender or kind[:2] != mine[:2]:
                continue
            if kind.precision != mine.precision and kind.precision not in others:
                others[kind.precision] = distances(files, found)[0]
            elif kind.precision == mine.precision and said["agrees"] is None:
                far, levels = distances(files, found)
                said |= {"latents_distance": far, "pixels_levels": levels}
                said |= {"compared_with": kind.contender}
                said["agrees"] = within(far, None if blended else levels)
        if any(each is not None and not each <= OTHER for each in others.values()):
            said["agrees"] = False
        return said

    def _keep(self) -> None:
        rows = [
            [*kind, files[0] and str(files[0]), str(files[1])]
            for kind, files in self._first.items()
        ]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".part")
        beside.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        os.replace(beside, self._path)


def within(latents: float | None, levels: float | None) -> bool:
    """Whether distances are those of rounding; of what is not known nothing is asked."""
    return (latents is None or latents <= SAME) and (levels is None or levels <= LEVELS)


def distances(
    one: tuple[Path | None, Path], other: tuple[Path | None, Path]
) -> tuple[float | None, float | None]:
    """Of the latents (None where either has none) and of the first pictures."""
    far = None
    if one[0] is not None and other[0] is not None:
        far = latents_distance(latents_of(one[0]), latents_of(other[0]))
    return far, pixels_levels(_pixels(one[1]), _pixels(other[1]))


def pixels_levels(one: "np.ndarray[Any, Any]", other: "np.ndarray[Any, Any]") -> float | None:
    """Mean absolute difference of `[height, width, 3]` in levels of 255."""
    if one.shape != other.shape:
        return None
    return float(np.mean(np.abs(one.astype(np.int16) - other.astype(np.int16))))


def _pixels(path: Path) -> "np.ndarray[Any, Any]":
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
