"""The demo model's world: coloured shapes on a coloured background, and where they stand.

A scene holds one thing at a place, one to four equal things, or two things in a relation.
`captions.py` says it, `drawing.py` draws it, `detector.py` reads it back. A tenth of all
combinations of shape, colour and place, of count, and of two things and their relation is held
out: nothing trains on them.
"""

import hashlib
import random
from dataclasses import dataclass

Point = tuple[float, float]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (250, 220, 50),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
    "orange": (250, 130, 20),
    "purple": (130, 50, 170),
    "pink": (250, 160, 200),
    "grey": (130, 130, 130),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring")
SIZES: dict[str, float] = {"small": 12.5, "medium": 18.5, "large": 27.0}  # radius, px
PLACES: dict[str, Point] = {  # centre (x, y) in shares of the canvas; y grows downwards
    "top left": (0.25, 0.25),
    "top": (0.5, 0.25),
    "top right": (0.75, 0.25),
    "left": (0.25, 0.5),
    "centre": (0.5, 0.5),
    "right": (0.75, 0.5),
    "bottom left": (0.25, 0.75),
    "bottom": (0.5, 0.75),
    "bottom right": (0.75, 0.75),
}
RELATIONS: dict[str, tuple[Point, Point]] = {  # centres of the first and of the second thing
    "left of": (PLACES["left"], PLACES["right"]),
    "right of": (PLACES["right"], PLACES["left"]),
    "above": (PLACES["top"], PLACES["bottom"]),
    "below": (PLACES["bottom"], PLACES["top"]),
}
LAYOUTS: dict[int, tuple[Point, ...]] = {  # centres of two, three and four equal things
    2: (PLACES["left"], PLACES["right"]),
    3: (PLACES["top"], PLACES["bottom left"], PLACES["bottom right"]),
    4: tuple(PLACES[name] for name in ("top left", "top right", "bottom left", "bottom right")),
}
CANVASES = ((128, 128), (192, 128), (128, 192))  # width, height, px
KINDS = ("place", "relation", "count")

_INVERSE = {"right of": "left of", "below": "above"}
_MAX_SHIFT = {"place": 2.5, "relation": 1.5, "count": 1.5}  # px, jitter of a centre on each axis
_MAX_STRETCH = 0.04  # jitter of a radius, as a share of it


@dataclass(frozen=True)
class Thing:
    """What a caption says of an object."""

    shape: str
    colour: str
    size: str = "medium"


@dataclass(frozen=True)
class Drawn:
    """An object as it is drawn: centre and radius in px."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What a caption says, and the jitter it leaves open.

    Attributes:
        things: one, or two that stand in `relation`.
        place: of a single thing that is there once.
        count: how often a single thing is there, 1 to 4.
        jitter: of each drawn object (shift x px, shift y px, stretch as a factor); none if empty.
    """

    things: tuple[Thing, ...]
    background: str = "white"
    place: str = "centre"
    relation: str = ""
    count: int = 1
    canvas: tuple[int, int] = (128, 128)
    jitter: tuple[tuple[float, float, float], ...] = ()

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return "relation" if self.relation else "count" if self.count > 1 else "place"

    @property
    def drawn(self) -> tuple[Drawn, ...]:
        """The objects in px, in the order of `things` or of `LAYOUTS`."""
        if self.relation:
            centres: tuple[Point, ...] = RELATIONS[self.relation]
        else:
            centres = LAYOUTS.get(self.count, (PLACES[self.place],))
        things = self.things if self.relation else self.things * self.count
        jitter = self.jitter or ((0.0, 0.0, 1.0),) * len(centres)
        width, height = self.canvas
        return tuple(
            Drawn(
                thing.shape,
                thing.colour,
                x * width + shift_x,
                y * height + shift_y,
                SIZES[thing.size] * stretch,
            )
            for thing, (x, y), (shift_x, shift_y, stretch) in zip(
                things, centres, jitter, strict=True
            )
        )

    @property
    def held_out(self) -> bool:
        """True for the tenth of all combinations, chosen by hash, that no training may see.

        Sizes, background and canvas do not count, and "left of" is "right of" the other way round.
        Two equal things side by side count as a relation, though they look like a count of two.
        """
        named = [f"{thing.colour} {thing.shape}" for thing in self.things]
        joint = self.relation or (f"x{self.count}" if self.count > 1 else self.place)
        if joint in _INVERSE:
            named, joint = named[::-1], _INVERSE[joint]
        return hashlib.sha256("|".join([joint, *named]).encode()).digest()[0] % 10 == 0


def random_scene(
    rng: random.Random,
    held_out: bool = False,
    kind: str | None = None,
    canvas: tuple[int, int] | None = None,
) -> Scene:
    """A scene with jitter from the training side of the split, or from the held-out side."""
    kind = kind or rng.choices(KINDS, (40, 36, 24))[0]
    canvas = canvas or rng.choices(CANVASES, (3, 1, 1))[0]
    while True:
        scene = _any_scene(rng, kind, canvas)
        if scene.held_out == held_out:
            return scene


def _any_scene(rng: random.Random, kind: str, canvas: tuple[int, int]) -> Scene:
    # What goes unsaid is drawn often enough to be learned: all of it at once, and each by itself.
    plain = kind == "place" and rng.random() < 0.2
    background = "white" if plain or rng.random() < 0.2 else rng.choice(tuple(COLOURS))
    inks = [name for name in COLOURS if name != background]
    place, relation, count = "centre", "", 1
    if kind == "relation":
        relation = rng.choice(tuple(RELATIONS))
    elif kind == "count":
        count = rng.choice(tuple(LAYOUTS))
    else:
        place = "centre" if plain or rng.random() < 0.2 else rng.choice(tuple(PLACES))
    sizes = ("medium",) if plain else ("medium", *SIZES)
    things = tuple(
        Thing(rng.choice(SHAPES), rng.choice(inks), rng.choice(sizes))
        for _ in range(2 if relation else 1)
    )
    most = _MAX_SHIFT[kind]
    jitter = tuple(
        (rng.uniform(-most, most), rng.uniform(-most, most), 1 + rng.uniform(-1, 1) * _MAX_STRETCH)
        for _ in range(2 if relation else count)
    )
    return Scene(things, background, place, relation, count, canvas, jitter)
