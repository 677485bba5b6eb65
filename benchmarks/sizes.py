"""Every size from 256 to 4096 px a side, with each of the four tables: is the picture that size?

    python benchmarks/sizes.py

Counts for how many sizes diffusers' resize and ours give a picture of exactly the size asked for,
by arithmetic alone: no pixels. Writes benchmarks/results/sizes.json; half a minute.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.machine import recorded, save
from lowvram.bins import bins
from lowvram.pixels.fit import cover_size

CELLS = (32, 64, 128, 256)
SIDES = np.arange(256, 4097)


def bins_of(cells: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Width and height that are computed for each width with that height."""
    table = bins(cells)
    ratios, sizes = np.array(list(table)), np.array(list(table.values()))
    nearest = np.abs(ratios[:, None] - height / SIDES[None, :]).argmin(0)
    return sizes[nearest, 1], sizes[nearest, 0]


def diffusers_size(
    width: np.ndarray, height: np.ndarray, to_height: int
) -> tuple[np.ndarray, np.ndarray]:
    """What `resize_and_crop_tensor` scales to, before it crops."""
    ratio = np.maximum(to_height / height, SIDES / width)
    return (width * ratio).astype(int), (height * ratio).astype(int)


def main() -> int:
    """Count, write, print."""
    about = recorded()
    total = wrong_there = wrong_here = differs = 0
    for cells in CELLS:
        for to_height in SIDES.tolist():
            width, height = bins_of(cells, to_height)
            theirs_width, theirs_height = diffusers_size(width, height, to_height)
            wrong = (theirs_width < SIDES) | (theirs_height < to_height)
            ours_width = np.maximum(theirs_width, SIDES)
            ours_height = np.maximum(theirs_height, to_height)
            total += len(SIDES)
            wrong_there += int(wrong.sum())
            wrong_here += int(((ours_width < SIDES) | (ours_height < to_height)).sum())
            same = (ours_width == theirs_width) & (ours_height == theirs_height)
            differs += int((~same & ~wrong).sum())
            at = to_height * 7 % len(SIDES)  # that the arrays above are what the function gives
            size = cover_size(int(width[at]), int(height[at]), int(SIDES[at]), to_height)
            assert size == (ours_width[at], ours_height[at]), (cells, SIDES[at], to_height)
    result: dict[str, Any] = {
        "benchmark": "sizes",
        **about,
        "sizes": total,
        "wrong_in_diffusers": wrong_there,
        "wrong_in_diffusers_part": round(wrong_there / total, 4),
        "wrong_here": wrong_here,
        "not_as_diffusers_where_it_is_right": differs,
    }
    save("sizes", result)
    print(json.dumps(result, separators=(",", ":")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
