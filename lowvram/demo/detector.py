"""A rule-based judge: reads background and objects back from a picture, and says what is wrong.

It is written from the scene definitions alone and checked against drawn pictures; no picture of
the trained model had a say in it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from .drawing import area, centroids, coverage
from .reading import Asked
from .scenes import CANVASES, COLOURS, PLACES, SHAPES, SIZES, Scene

_BORDER = 3  # px; no scene covers more than a fifth of this frame
_MIN_DISTANCE = 40.0  # RGB distance from the background; less is noise (closest two colours: 102)
_MAX_OFF_LINE = 60.0  # RGB distance from all mixtures of two colours; more is a third colour
_MIN_AREA = 60.0  # px; the smallest object of a scene (a small star) covers about 180
_MIN_OVERLAP = 0.75  # IoU; drawn shapes have 0.92, blurred ones 0.87: what has less is no shape
_SHARPEN = 2.0  # of an edge before its shape is fitted: a blurred one is wide
_EIGHT = np.ones((3, 3), dtype=bool)  # neighbours, corners too


@dataclass(frozen=True)
class Seen:
    """An object that was seen.

    Attributes:
        shape: the one whose outline covers the object best; empty where none does by 75 %.
        x, y, radius: px, of that outline.
        overlap: intersection over union with it.
    """

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    size: str
    overlap: float


@dataclass(frozen=True)
class Sighting:
    """What was seen; the largest object first."""

    background: str
    objects: tuple[Seen, ...]
    canvas: tuple[int, int]


def look(picture: Image.Image) -> Sighting:
    """Read a picture.

    Raises:
        ValueError: it is of none of the sizes in `CANVASES`.
    """
    if picture.size not in CANVASES:
        known = ", ".join(f"{width}x{height}" for width, height in CANVASES)
        width, height = picture.size
        raise ValueError(f"the judge reads pictures of {known} px, not {width}x{height}")
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    ground = _frame_colour(pixels)
    standing_out = np.linalg.norm(pixels - ground, axis=-1) > _MIN_DISTANCE
    found = sorted(_objects(pixels, ground, standing_out), key=lambda seen: -seen.radius)
    return Sighting(_nearest_colour(ground), tuple(found), picture.size)


def verdict(sighting: Sighting, wanted: Scene | Asked) -> dict[str, bool]:
    """What of a picture is as asked; what a prompt leaves open is left out.

    The objects asked for are matched one to one with those seen, by shape and colour, then by
    size, then by where they stand. Of these:

    - "background": its colour.
    - "count": as many objects as asked for, no more.
    - "shape", "colour", "size": of every object asked for; wrong where one is missing.
    - "place", of a single thing: the nearest place is the one asked for.
    - "relation", of two things: the first lies in that direction from the second, less than 45
      degrees off. Where several equal things stand is not judged.
    - "everything": all of the above.
    """
    asked = Asked.of(wanted) if isinstance(wanted, Scene) else wanted
    seen = match(sighting, asked)
    right = {"count": len(sighting.objects) == len(asked.objects)}
    if asked.background:
        right["background"] = sighting.background == asked.background
    for name in ("shape", "colour", "size"):
        values = [getattr(thing, name) for thing in asked.objects]
        if any(values):
            right[name] = all(
                each is not None and value in (None, getattr(each, name))
                for value, each in zip(values, seen, strict=True)
            )
    if asked.place:
        right["place"] = seen[0] is not None and place_of(seen[0], sighting.canvas) == asked.place
    if asked.relation:
        first, second = seen
        right["relation"] = bool(first and second and relation_of(first, second) == asked.relation)
    return right | {"everything": all(right.values())}


def right_shares(verdicts: Sequence[Mapping[str, bool]]) -> dict[str, float]:
    """The share of pictures that are right in each thing that a verdict judges."""
    names = sorted({name for each in verdicts for name in each})
    said = {name: [each[name] for each in verdicts if name in each] for name in names}
    return {name: sum(right) / len(right) for name, right in said.items()}


def match(sighting: Sighting, asked: Asked) -> list[Seen | None]:
    """For each object asked for the one seen that is most like it, if any is left."""
    matched: list[Seen | None] = [None] * len(asked.objects)
    likeness = np.zeros((len(matched), len(sighting.objects)))
    width, height = sighting.canvas
    for row, thing in enumerate(asked.objects):
        for column, seen in enumerate(sighting.objects):
            likeness[row, column] = (
                (seen.shape == thing.shape)
                + (seen.colour == thing.colour)
                + 0.1 * (seen.size == thing.size)
            )
            if asked.centres:
                at = seen.x / width, seen.y / height
                likeness[row, column] -= 0.01 * math.dist(at, asked.centres[row])
    for row, column in zip(*linear_sum_assignment(likeness, maximize=True), strict=True):
        matched[row] = sighting.objects[column]
    return matched


def place_of(seen: Seen, canvas: tuple[int, int]) -> str:
    """The place that an object is nearest to."""
    at = seen.x / canvas[0], seen.y / canvas[1]
    return min(PLACES, key=lambda name: math.dist(PLACES[name], at))


def relation_of(first: Seen, second: Seen) -> str:
    """Where the first object is, seen from the second."""
    right, down = first.x - second.x, first.y - second.y
    if abs(right) >= abs(down):
        return "right of" if right > 0 else "left of"
    return "below" if down > 0 else "above"


def _frame_colour(pixels: np.ndarray) -> np.ndarray:
    """Median RGB of the picture's frame, which is background in every scene."""
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    return np.median(pixels[frame], axis=0)


def _nearest_colour(rgb: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.linalg.norm(rgb - COLOURS[name])))


def _objects(
    pixels: np.ndarray, ground: np.ndarray, mask: np.ndarray, left: int = 0, top: int = 0
) -> Iterator[Seen]:
    """The connected objects in the mask, of pixels whose first lies at (left, top).

    A pixel on an edge mixes two colours into a third (red and yellow into orange), so a connected
    part has the colour of its inner pixels, and every pixel that is a mixture of it and the
    background belongs to it. What is none is looked at again: a second object that touches.
    """
    labels, _ = ndimage.label(mask, structure=_EIGHT)
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        part, within = labels[box] == index, pixels[box]
        if part.sum() < _MIN_AREA:
            continue
        colour, ink = _ink(within, part)
        line = ink - ground
        length = max(float(np.linalg.norm(line)), 1.0)
        share = (within - ground) @ line / length**2
        off_line = np.linalg.norm(within - ground - share[..., None] * line, axis=-1)
        foreign = part & (np.maximum(off_line, (share - 1) * length) > _MAX_OFF_LINE)
        foreign = ndimage.binary_opening(foreign, structure=_EIGHT)
        share = np.where(part & ~foreign, share, 0.0)
        x, y = left + box[1].start, top + box[0].start
        pieces, number = ndimage.label(share > 0.5)
        for piece in range(1, number + 1):
            mine = pieces == piece
            if mine.sum() >= _MIN_AREA:
                yield _fit(np.where(ndimage.binary_dilation(mine), share, 0.0), colour, x, y)
        if number and foreign.any():
            yield from _objects(within, ground, foreign, x, y)


def _ink(pixels: np.ndarray, part: np.ndarray) -> tuple[str, np.ndarray]:
    """The colour most of the inner pixels are nearest to, and their median RGB."""
    inner = ndimage.binary_erosion(part, structure=_EIGHT)
    voters = pixels[inner if inner.sum() >= _MIN_AREA / 4 else part]
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    votes = np.linalg.norm(voters[:, None] - palette, axis=-1).argmin(axis=1)
    winner = int(np.bincount(votes, minlength=len(palette)).argmax())
    return list(COLOURS)[winner], np.median(voters[votes == winner], axis=0)


def _fit(share: np.ndarray, colour: str, left: int, top: int) -> Seen:
    """The shape that overlaps most when laid over the object at equal area and centroid.

    Args:
        share: of the colour in each pixel, the first of which lies at (left, top).
    """
    room = max(share.shape) // 4  # for shapes that reach further
    seen = np.pad((_SHARPEN * (share - 0.5) + 0.5).clip(0, 1), room)
    height, width = seen.shape
    total = float(seen.sum())
    centre_x = float(seen.sum(axis=0) @ (np.arange(width) + 0.5)) / total
    centre_y = float(seen.sum(axis=1) @ (np.arange(height) + 0.5)) / total
    radius = np.array([math.sqrt(total / area(shape)) for shape in SHAPES])
    offsets = centroids() * radius[:, None]
    x, y = centre_x - offsets[:, 0], centre_y - offsets[:, 1]
    at_x, at_y, scale = (torch.from_numpy(each).float() for each in (x, y, radius))
    ideal = coverage(torch.arange(len(SHAPES)), at_x, at_y, scale, width, height).numpy()
    both = np.minimum(ideal, seen).sum(axis=(1, 2))
    overlaps = both / np.maximum(ideal, seen).sum(axis=(1, 2))
    best = int(overlaps.argmax())
    size = min(SIZES, key=lambda name: abs(math.log(SIZES[name] / radius[best])))
    shape = SHAPES[best] if overlaps[best] >= _MIN_OVERLAP else ""
    at = float(left - room + x[best]), float(top - room + y[best])
    return Seen(shape, colour, *at, float(radius[best]), size, float(overlaps[best]))
