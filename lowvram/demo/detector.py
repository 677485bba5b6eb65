"""A rule-based judge: reads background, colour, place, shape and size back from a picture.

It is written from the scene definitions alone and checked against drawn pictures; no picture of
the trained model had a say in it. Numpy and Pillow only.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from .scenes import CANVAS, COLOURS, PLACES, SHAPES, SIZES, outline, shape_mask

_BORDER = 3  # px; no shape touches more than a quarter of this frame
_MIN_DISTANCE = 40.0  # RGB distance from the background; less is noise (closest two colours: 102)
_MIN_AREA = 60  # px; the smallest scene object (a small star) covers about 180


@dataclass(frozen=True)
class Sighting:
    """What was seen; an empty string where no object was found. `overlap` is IoU with the shape."""

    shape: str
    colour: str
    background: str
    place: str
    size: str
    overlap: float

    @property
    def said(self) -> tuple[str, str, str, str, str]:
        """(shape, colour, background, place, size), comparable with `Scene.said`."""
        return self.shape, self.colour, self.background, self.place, self.size


def look(picture: Image.Image) -> Sighting:
    """Judge a picture of 128 x 128 px."""
    if picture.size != (CANVAS, CANVAS):
        raise ValueError(f"the judge reads {CANVAS} x {CANVAS} px, not {picture.size}")
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    ground = _frame_colour(pixels)
    background = _nearest_colour(ground)
    nothing = Sighting("", "", background, "", "", 0.0)
    found = _object_colour(pixels, ground, background)
    if found is None:
        return nothing
    colour, ink = found
    mask = _mask(pixels, ground, ink)
    if mask.sum() < _MIN_AREA:
        return nothing
    shape, x, y, radius, overlap = max(
        (_fit(mask, shape) for shape in SHAPES), key=lambda fitted: fitted[-1]
    )
    place = min(PLACES, key=lambda name: math.dist(PLACES[name], (x, y)))
    size = min(SIZES, key=lambda name: abs(math.log(SIZES[name] / radius)))
    return Sighting(shape, colour, background, place, size, overlap)


def _frame_colour(pixels: np.ndarray) -> np.ndarray:
    """Median RGB of the picture's frame, which is background in every scene."""
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    return np.median(pixels[frame], axis=0)


def _nearest_colour(rgb: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.linalg.norm(rgb - COLOURS[name])))


def _object_colour(
    pixels: np.ndarray, ground: np.ndarray, background: str
) -> tuple[str, np.ndarray] | None:
    """The object's colour name and its measured RGB, or None where nothing stands out.

    Every pixel that stands out votes for its nearest colour. Pixels on the edge abstain when they
    can, because they mix two colours into a third (red and yellow into orange).
    """
    outstanding = np.linalg.norm(pixels - ground, axis=-1) > _MIN_DISTANCE
    inner = _eroded(outstanding)
    voters = pixels[inner if inner.sum() >= _MIN_AREA // 2 else outstanding]
    if len(voters) == 0:
        return None
    names = [name for name in COLOURS if name != background]
    palette = np.array([COLOURS[name] for name in names], dtype=np.float32)
    votes = np.linalg.norm(voters[:, None] - palette, axis=-1).argmin(axis=1)
    winner = int(np.bincount(votes, minlength=len(names)).argmax())
    return names[winner], np.median(voters[votes == winner], axis=0)


def _eroded(mask: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(picture.filter(ImageFilter.MinFilter(3))) > 0


def _mask(pixels: np.ndarray, ground: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """Pixels nearer to the object's colour than to the background's, single specks removed."""
    line = ink - ground
    share = (pixels - ground) @ line / float(line @ line)
    mask = Image.fromarray((share > 0.5).astype(np.uint8) * 255)
    return np.asarray(mask.filter(ImageFilter.MedianFilter(3))) > 0


def _fit(mask: np.ndarray, shape: str) -> tuple[str, float, float, float, float]:
    """The shape laid over the mask at equal area and centroid.

    Returns (shape, centre x px, centre y px, radius px, IoU).
    """
    area, offset_x, offset_y = _moments(shape)
    rows, columns = np.nonzero(mask)
    radius = math.sqrt(len(rows) / area)
    x = float(columns.mean()) + 0.5 - offset_x * radius
    y = float(rows.mean()) + 0.5 - offset_y * radius
    ideal = np.asarray(shape_mask(shape, x, y, radius)) > 127
    overlap = (mask & ideal).sum() / max(int((mask | ideal).sum()), 1)
    return shape, x, y, radius, float(overlap)


@cache
def _moments(shape: str) -> tuple[float, float, float]:
    """(area, centroid x, centroid y) of the outline at radius 1, by the shoelace formula."""
    points = np.array(outline(shape))
    after = np.roll(points, -1, axis=0)
    cross = points[:, 0] * after[:, 1] - after[:, 0] * points[:, 1]
    area = cross.sum() / 2
    centroid = ((points + after) * cross[:, None]).sum(axis=0) / (6 * area)
    return abs(float(area)), float(centroid[0]), float(centroid[1])
