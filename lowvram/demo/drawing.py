"""Draws scenes with clean edges, many at once, on any device.

Each shape is a table of signed distances to its outline; a pixel is covered by as much as its
centre lies inside the edge, up to one pixel. Straight and gently curved edges are anti-aliased
exactly enough: a corner is rounded by less than half a pixel.
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .pictures import from_tensor
from .scenes import COLOURS, SHAPES, Scene

_REACH = 1.5  # half the side of a table, in radii; no shape reaches beyond 1.1
_CELLS = 384  # cells along a table's side: 0.2 px at the largest radius
_MOST = 4  # objects in a scene


def draw(scene: Scene) -> Image.Image:
    """The scene as an anti-aliased RGB picture of the size of its canvas."""
    return from_tensor(render([scene])[0])


def render(scenes: Sequence[Scene]) -> Tensor:
    """Scenes of one canvas as pictures, [batch, 3, height, width] in -1..1."""
    return paint(pack(scenes), *scenes[0].canvas)


def pack(scenes: Sequence[Scene]) -> Tensor:
    """Scenes as numbers, [batch, 5, 7]: a row for the background, then one for each object.

    Columns: shape (-1 for none), x, y and radius in px, red, green, blue in -1..1.
    """
    rows = np.zeros((len(scenes), 1 + _MOST, 7), dtype=np.float32)
    rows[:, :, 0] = -1
    rows[:, :, 3] = 1
    for row, scene in zip(rows, scenes, strict=True):
        row[0, 4:] = _rgb(scene.background)
        for index, item in enumerate(scene.drawn, start=1):
            row[index, :4] = SHAPES.index(item.shape), item.x, item.y, item.radius
            row[index, 4:] = _rgb(item.colour)
    return torch.from_numpy(rows)


def paint(packed: Tensor, width: int, height: int) -> Tensor:
    """What `pack` made, as pictures, [batch, 3, height, width] in -1..1."""
    count = len(packed)
    pixels = packed[:, 0, 4:, None, None].expand(count, 3, height, width)
    for index in range(1, packed.shape[1]):
        shape, x, y, radius = packed[:, index, :4].unbind(1)
        if not (shape >= 0).any():
            break
        cover = coverage(shape.long().clamp(min=0), x, y, radius, width, height)
        cover = cover * (shape >= 0)[:, None, None]
        pixels = torch.lerp(pixels, packed[:, index, 4:, None, None], cover[:, None])
    return pixels.contiguous()


def coverage(
    shape: Tensor, x: Tensor, y: Tensor, radius: Tensor, width: int, height: int
) -> Tensor:
    """How much of each pixel an object covers, 0..1, [batch, height, width].

    `shape` indexes `SHAPES`; `x`, `y` and `radius` are px; all [batch].
    """
    across = torch.arange(width, device=x.device) + 0.5
    down = torch.arange(height, device=x.device) + 0.5
    u = ((across - x[:, None]) / radius[:, None])[:, None, :].expand(-1, height, -1)
    v = ((down - y[:, None]) / radius[:, None])[:, :, None].expand(-1, -1, width)
    tables = distances(x.device)
    grid = torch.stack([u, v], dim=-1) / _REACH
    found = F.grid_sample(
        tables[shape][:, None], grid, mode="bilinear", padding_mode="border", align_corners=True
    )[:, 0]
    return (0.5 - found * radius[:, None, None]).clamp(0, 1)


@cache
def distances(device: torch.device) -> Tensor:
    """Signed distance to each shape's outline in radii, negative inside, [shapes, 384, 384]."""
    if device.type != "cpu":
        return distances(torch.device("cpu")).to(device)
    axis = np.linspace(-_REACH, _REACH, _CELLS)
    points = np.stack(np.meshgrid(axis, axis), axis=-1)
    return torch.from_numpy(
        np.stack([_distance(shape, points) for shape in SHAPES]).astype(np.float32)
    )


@cache
def area(shape: str) -> float:
    """The shape's area at radius 1."""
    return float(
        (distances(torch.device("cpu"))[SHAPES.index(shape)] < 0).sum()
        * (2 * _REACH / (_CELLS - 1)) ** 2
    )


@cache
def centroids() -> np.ndarray:
    """Where each shape's centroid lies from its centre, in radii, [shapes, 2] (x, y)."""
    inside = (distances(torch.device("cpu")) < 0).numpy()
    axis = np.linspace(-_REACH, _REACH, _CELLS)
    total = inside.sum(axis=(1, 2))
    return np.stack([inside.sum(axis=1) @ axis / total, inside.sum(axis=2) @ axis / total], axis=1)


def _distance(shape: str, points: np.ndarray) -> np.ndarray:
    if shape == "circle":
        return np.hypot(points[..., 0], points[..., 1]) - 0.95
    if shape == "ring":
        return np.abs(np.hypot(points[..., 0], points[..., 1]) - 0.76) - 0.24
    corners = np.array(outline(shape))
    after = np.roll(corners, -1, axis=0)
    inside = np.zeros(points.shape[:-1], dtype=bool)
    nearest = np.full(points.shape[:-1], np.inf)
    for (x0, y0), (x1, y1) in zip(corners, after, strict=True):
        edge, offset = np.array([x1 - x0, y1 - y0]), points - (x0, y0)
        share = np.clip(offset @ edge / (edge @ edge), 0, 1)
        nearest = np.minimum(nearest, np.linalg.norm(offset - share[..., None] * edge, axis=-1))
        crosses = (y0 > points[..., 1]) != (y1 > points[..., 1])
        if y0 != y1:
            at = x0 + (points[..., 1] - y0) * (x1 - x0) / (y1 - y0)
            inside ^= crosses & (points[..., 0] < at)
    return np.where(inside, -nearest, nearest)


def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The polygon of a shape that has one, around its centre, in radii, y downwards.

    The areas are alike (1.9 to 2.7) except for the star's and the cross's, so that size can be
    told by eye.
    """
    turn = 2 * math.pi
    if shape == "square":
        return ((-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82))
    if shape == "triangle":
        return ((0.0, -1.0), (1.05, 0.85), (-1.05, 0.85))
    if shape == "diamond":
        return ((0.0, -1.1), (0.9, 0.0), (0.0, 1.1), (-0.9, 0.0))
    if shape == "star":
        radii = (1.05, 0.44)
        corners = [(radii[i % 2], turn * i / 10) for i in range(10)]
        return tuple((r * math.sin(angle), 0.05 - r * math.cos(angle)) for r, angle in corners)
    if shape == "heart":
        return tuple(_heart_point(turn * i / 90) for i in range(90))
    if shape == "cross":
        arm, half = 1.0, 0.34
        corner = [(half, -arm), (half, -half), (arm, -half), (arm, half), (half, half), (half, arm)]
        return tuple(corner + [(-px, -py) for px, py in corner])
    raise ValueError(f"no outline for {shape!r}; the shapes are {', '.join(SHAPES)}")


def _heart_point(t: float) -> tuple[float, float]:
    """The usual heart curve (x = 16 sin^3 t), scaled to a half width of one radius."""
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return math.sin(t) ** 3, -(y + 2.5) / 16


def _rgb(colour: str) -> np.ndarray:
    return np.array(COLOURS[colour], dtype=np.float32) / 127.5 - 1
