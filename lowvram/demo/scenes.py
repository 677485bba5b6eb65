"""The demo model's world: one coloured shape on a coloured background, and ways to say it.

A scene can be drawn (128 x 128 px) and captioned (lower-case English, many phrasings). Ten per cent
of all (shape, colour, background, place, size) tuples are held out: nothing trains on them.
"""

import hashlib
import itertools
import math
import random
from dataclasses import astuple, dataclass
from functools import cache

from PIL import Image, ImageDraw

CANVAS = 128  # px, both sides
_SUPERSAMPLING = 4  # drawn this much larger, then averaged: 16 grey levels along an edge

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (250, 220, 50),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
    "orange": (250, 130, 20),
    "purple": (130, 50, 170),
}
SIZES: dict[str, float] = {"small": 13.5, "medium": 19.5, "large": 28.0}  # radius, px
PLACES: dict[str, tuple[float, float]] = {  # centre (x, y), px; y grows downwards
    "top left": (32.0, 32.0),
    "top": (64.0, 32.0),
    "top right": (96.0, 32.0),
    "left": (32.0, 64.0),
    "centre": (64.0, 64.0),
    "right": (96.0, 64.0),
    "bottom left": (32.0, 96.0),
    "bottom": (64.0, 96.0),
    "bottom right": (96.0, 96.0),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")

_MAX_SHIFT = 2.5  # px, jitter of the centre on each axis
_MAX_STRETCH = 0.05  # jitter of the radius, as a share of it

_SIZE_WORDS = {
    "small": ("small", "small", "tiny", "little"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "large", "big", "huge"),
}
_SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star", "star", "five-pointed star"),
    "heart": ("heart", "heart", "heart shape"),
    "cross": ("cross", "cross", "plus sign"),
}
_ROWS = {"top": ("top", "top", "upper"), "bottom": ("bottom", "bottom", "lower")}
_MIDDLE = ("centre", "center", "middle")
_PREFIXES = ("", "", "", "", "", "a picture of ", "an image of ", "a drawing of ")


@dataclass(frozen=True)
class Scene:
    """What a caption says, and the jitter it leaves open (shift in px, stretch as a factor)."""

    shape: str
    colour: str
    background: str
    place: str
    size: str
    shift_x: float = 0.0
    shift_y: float = 0.0
    stretch: float = 1.0

    @property
    def said(self) -> tuple[str, str, str, str, str]:
        """(shape, colour, background, place, size): what can be read back from a picture."""
        return astuple(self)[:5]

    @property
    def held_out(self) -> bool:
        """True for the tenth of all tuples, chosen by hash, that no training may see."""
        return hashlib.sha256("|".join(self.said).encode()).digest()[0] % 10 == 0


@cache
def all_scenes(held_out: bool) -> tuple[Scene, ...]:
    """Every tuple of the one or the other side of the split, without jitter, in a fixed order."""
    every = itertools.product(SHAPES, COLOURS, COLOURS, PLACES, SIZES)
    scenes = (Scene(*said) for said in every if said[1] != said[2])
    return tuple(scene for scene in scenes if scene.held_out == held_out)


def random_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A scene with jitter from the training side of the split, or from the held-out side."""
    return Scene(
        *rng.choice(all_scenes(held_out)).said,
        shift_x=rng.uniform(-_MAX_SHIFT, _MAX_SHIFT),
        shift_y=rng.uniform(-_MAX_SHIFT, _MAX_SHIFT),
        stretch=1.0 + rng.uniform(-_MAX_STRETCH, _MAX_STRETCH),
    )


def draw(scene: Scene) -> Image.Image:
    """The scene as an anti-aliased RGB picture, 128 x 128 px."""
    x, y = PLACES[scene.place]
    radius = SIZES[scene.size] * scene.stretch
    mask = shape_mask(scene.shape, x + scene.shift_x, y + scene.shift_y, radius)
    background = Image.new("RGB", mask.size, COLOURS[scene.background])
    return Image.composite(Image.new("RGB", mask.size, COLOURS[scene.colour]), background, mask)


def shape_mask(shape: str, x: float, y: float, radius: float) -> Image.Image:
    """Coverage (0..255) of a shape with its centre at (x, y) px: mode L, 128 x 128 px."""
    large = Image.new("L", (CANVAS * _SUPERSAMPLING, CANVAS * _SUPERSAMPLING), 0)
    points = [
        ((x + radius * px) * _SUPERSAMPLING, (y + radius * py) * _SUPERSAMPLING)
        for px, py in outline(shape)
    ]
    ImageDraw.Draw(large).polygon(points, fill=255)
    return large.reduce(_SUPERSAMPLING)


@cache
def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The shape's polygon around its centre, in units of its radius, y downwards.

    The areas are alike (2.3 to 2.9) except for the star and the cross, so size can be told by eye.
    """
    turn = 2 * math.pi
    if shape == "circle":
        return tuple(
            (0.95 * math.cos(turn * i / 90), 0.95 * math.sin(turn * i / 90)) for i in range(90)
        )
    if shape == "square":
        return ((-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82))
    if shape == "triangle":
        return ((0.0, -1.0), (1.05, 0.85), (-1.05, 0.85))
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
    raise ValueError(f"no such shape: {shape!r}; there are {', '.join(SHAPES)}")


def _heart_point(t: float) -> tuple[float, float]:
    """The usual heart curve (x = 16 sin^3 t), scaled to a half width of one radius."""
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return math.sin(t) ** 3, -(y + 2.5) / 16


def caption(scene: Scene, rng: random.Random) -> str:
    """One of many ways to say the scene, in lower case.

    A medium size, a central place and a white background go unsaid about half of the time: they
    are what is drawn when a prompt leaves them open.
    """
    silent_size = scene.size == "medium" and rng.random() < 0.6
    silent_place = scene.place == "centre" and rng.random() < 0.5
    silent_background = scene.background == "white" and rng.random() < 0.4
    size = "" if silent_size else rng.choice(_SIZE_WORDS[scene.size])
    shape = rng.choice(_SHAPE_WORDS[scene.shape])
    place = "" if silent_place else _say_place(scene.place, rng)
    ground = "" if silent_background else _say_background(scene.background, rng)
    named = _article(_join(" ", size, scene.colour, shape))
    prefix = rng.choice(_PREFIXES)
    comma = rng.choice((" ", ", "))
    forms = [
        prefix + _join(comma, _join(" ", named, ground), place),
        prefix + _join(comma, _join(" ", named, ground), place),
        prefix + _join(comma, _join(" ", named, place), ground),
        prefix + _join(" ", _article(_join(" ", size, shape)), "in", scene.colour, ground, place),
        _join(", ", ground, _join(" ", named, place)),
        _join(", ", place, _join(" ", named, ground)),
        _join(", ", _article(f"{scene.colour} {shape}"), size, ground, place),
        _join(", ", _join(" ", size, scene.colour, shape), ground, place),
    ]
    if ground:
        canvas = rng.choice(("background", "background", "backdrop"))
        forms += [
            _join(" ", _article(f"{scene.background} {canvas}"), "with", named, place),
            _join(", ", named[named.index(" ") + 1 :], f"{scene.background} {canvas}", place),
        ]
    return rng.choice(forms)


def _say_place(place: str, rng: random.Random) -> str:
    if place == "centre":
        return f"in the {rng.choice(_MIDDLE)}"
    if place in ("left", "right"):
        middle = rng.choice(_MIDDLE)
        forms = (f"on the {place}", f"on the {place} side", f"at the {place}", f"{middle} {place}")
        return rng.choice(forms)
    row, _, column = place.partition(" ")
    row_word = rng.choice(_ROWS[row])
    if not column:
        middle = rng.choice(_MIDDLE)
        return rng.choice((f"at the {row}", f"at the {row}", f"in the {row_word} {middle}"))
    corner = f"{row_word} {column}"
    return rng.choice((f"in the {corner}", f"in the {corner} corner", f"at the {corner}", corner))


def _say_background(colour: str, rng: random.Random) -> str:
    before = rng.choice(("on", "on", "on", "over", "against"))
    background = _article(f"{colour} {rng.choice(('background', 'background', 'backdrop'))}")
    return rng.choice((f"{before} {background}", f"{before} {background}", f"on {colour}"))


def _article(noun_phrase: str) -> str:
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


def _join(separator: str, *parts: str) -> str:
    return separator.join(part for part in parts if part)
