"""Ways to say a scene, in lower-case English: the language of the demo model.

A medium size, the centre and a white background often go unsaid: they are what is drawn when a
prompt leaves them open. A colour or a shape that goes unsaid is any.
"""

import random
import re
import string

from .scenes import COLOURS, SHAPES, Scene, Thing

SIZE_WORDS = {
    "small": ("small", "small", "small", "tiny", "little"),
    "medium": ("medium", "medium-sized", "medium sized"),
    "large": ("large", "large", "big", "big", "huge"),
}
SHAPE_WORDS = {  # singular, plural; the first pair is the usual one
    "circle": (("circle", "circles"), ("disc", "discs"), ("dot", "dots")),
    "square": (("square", "squares"), ("box", "boxes")),
    "triangle": (("triangle", "triangles"),),
    "star": (("star", "stars"), ("five-pointed star", "five-pointed stars")),
    "heart": (("heart", "hearts"), ("heart shape", "heart shapes")),
    "cross": (("cross", "crosses"), ("plus sign", "plus signs"), ("plus", "pluses")),
    "diamond": (("diamond", "diamonds"), ("rhombus", "rhombuses")),
    "ring": (("ring", "rings"), ("hoop", "hoops"), ("donut", "donuts")),
}
COLOUR_WORDS = {colour: (colour,) for colour in COLOURS} | {
    "grey": ("grey", "gray"),
    "purple": ("purple", "purple", "violet"),
}
COUNT_WORDS = {
    1: ("one", "one", "a single", "1"),
    2: ("two", "two", "two", "2", "a pair of", "a couple of"),
    3: ("three", "three", "three", "3"),
    4: ("four", "four", "four", "4"),
}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "above", "on top of"),
    "below": ("below", "below", "under", "beneath", "underneath"),
}
MIDDLE_WORDS = ("centre", "center", "middle")
ROW_WORDS = {"top": ("top", "top", "upper"), "bottom": ("bottom", "bottom", "lower")}
GROUND_WORDS = ("background", "background", "backdrop")
PREFIXES = ("a picture of", "an image of", "a drawing of", "a photo of", "a painting of")
ENDS = {
    "left of": ("on the left", "on the right"),
    "right of": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}
FILLERS = (
    "beautiful", "simple", "flat", "nice", "bright", "cute", "minimal", "clean", "please",
    "high quality", "digital art", "vector art", "on paper", "detailed", "style", "4k", "best",
    "made by hand", "of my dreams", "in the morning", "like a logo", "icon", "poster", "trending",
)  # fmt: skip


def caption(scene: Scene, rng: random.Random) -> str:
    """One of many ways to say the whole scene."""
    say = {"place": _say_place_scene, "relation": _say_relation, "count": _say_count}[scene.kind]
    text = say(scene, rng)
    starts = text.startswith(("a ", "an "))
    return f"{rng.choice(PREFIXES)} {text}" if starts and rng.random() < 0.15 else text


def decorated(text: str, rng: random.Random) -> str:
    """The caption with words around and in it that mean nothing to the model."""
    words = text.split(" ")
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.choice((0, len(words), len(words), rng.randint(0, len(words))))
        words.insert(place, _noise_word(rng) if rng.random() < 0.3 else rng.choice(FILLERS))
    if rng.random() < 0.3:
        words[-1] += f", {rng.choice(FILLERS)}"
    return " ".join(words) + rng.choice(("", "", ".", "!"))


def fragment(scene: Scene, rng: random.Random) -> str:
    """Words that are true of the scene and leave the rest open, or the scene without its colour.

    Bare words ("blue", "star", "top left") leave all else open: a negative prompt is mostly such
    a text. What has an article or a colour and a shape is a whole caption, and what it does not
    say is as usual: "a grey diamond" stands alone in the centre on white.
    """
    if scene.kind != "relation" and rng.random() < 0.4:
        return without_colour(caption(scene, rng), scene.things[0].colour)
    thing = rng.choice(scene.things)
    colour, ground = (rng.choice(COLOUR_WORDS[c]) for c in (thing.colour, scene.background))
    texts = [colour, colour, colour, ground, shape_word(thing.shape, rng), f"{colour} things"]
    texts += [f"{ground} {rng.choice(GROUND_WORDS)}", rng.choice(SIZE_WORDS[thing.size])]
    if scene.kind == "count":
        plural = shape_word(thing.shape, rng, plural=True)
        texts += [rng.choice(COUNT_WORDS[scene.count]), plural]
    elif scene.kind == "place":
        texts += [say_place(scene.place, rng)]
    return rng.choice(texts)


def without_colour(text: str, colour: str) -> str:
    """A caption of a single thing that no longer says the thing's colour."""
    words = "|".join(COLOUR_WORDS[colour])
    text = re.sub(rf" in ({words})\b|\b({words}) ", "", text, count=1)
    return re.sub(r"\ban?(?= ([a-z]))", lambda found: article(found[1]).split()[0], text)


def shape_word(shape: str, rng: random.Random, plural: bool = False) -> str:
    """A name of the shape, mostly its first."""
    names = SHAPE_WORDS[shape]
    return (names[0] if rng.random() < 0.7 else rng.choice(names))[plural]


def article(noun_phrase: str) -> str:
    """With "a" or "an" before it."""
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


def say_place(place: str, rng: random.Random) -> str:
    """One of the ways to say a place."""
    if place == "centre":
        return f"in the {rng.choice(MIDDLE_WORDS)}"
    if place in ("left", "right"):
        middle = rng.choice(MIDDLE_WORDS)
        forms = (f"on the {place}", f"on the {place} side", f"at the {place}", f"{middle} {place}")
        return rng.choice(forms)
    row, _, column = place.partition(" ")
    row_word = rng.choice(ROW_WORDS[row])
    if not column:
        middle = rng.choice(MIDDLE_WORDS)
        return rng.choice((f"at the {row}", f"at the {row}", f"in the {row_word} {middle}"))
    corner = f"{row_word} {column}"
    return rng.choice((f"in the {corner}", f"in the {corner} corner", f"at the {corner}", corner))


def say_background(colour: str, rng: random.Random) -> str:
    """One of the ways to say a background at the end of a sentence."""
    name, noun = rng.choice(COLOUR_WORDS[colour]), rng.choice(GROUND_WORDS)
    forms = [f"{before} {article(f'{name} {noun}')}" for before in ("on", "on", "over", "against")]
    forms += [f"on {name}", f"on {name}", f"with {article(f'{name} {noun}')}"]
    forms += [f"{name} {noun}", f"{noun} of {name}", f"with a {noun} of {name}"]
    forms += [f"in front of {article(f'{name} {noun}')}", f"on a {noun} of {name}"]
    return rng.choice(forms)


def _noun(thing: Thing, rng: random.Random, plural: bool = False, size: str | None = None) -> str:
    """The thing without an article: "large blue star"; a medium size mostly goes unsaid."""
    if size is None:
        size = _size(thing, rng)
    shape, colour = shape_word(thing.shape, rng, plural), rng.choice(COLOUR_WORDS[thing.colour])
    if not plural and rng.random() < 0.06:
        return _join(" ", size, shape, f"in {colour}")
    if size and rng.random() < 0.06:
        return f"{colour} {size} {shape}"
    return _join(" ", size, colour, shape)


def _size(thing: Thing, rng: random.Random) -> str:
    silent = thing.size == "medium" and rng.random() < 0.65
    return "" if silent else rng.choice(SIZE_WORDS[thing.size])


def _ground(scene: Scene, rng: random.Random) -> str:
    silent = scene.background == "white" and rng.random() < 0.6
    return "" if silent else say_background(scene.background, rng)


def _framed(body: str, ground: str, rng: random.Random) -> str:
    """The body with its background behind or before it."""
    if not ground:
        return body
    if ground.split()[0] in COLOURS or ground.split()[0] in ("gray", "violet", "background"):
        behind = rng.random() < 0.6
        return f"{body}, {ground}" if behind else f"{ground}, {body}"
    choice = rng.random()
    if choice < 0.7 or not ground.startswith(("on", "against")):
        return f"{body}{rng.choice((' ', ' ', ', '))}{ground}"
    return f"{ground}{rng.choice((', ', ' '))}{body}"


def _say_place_scene(scene: Scene, rng: random.Random) -> str:
    thing, ground = scene.things[0], _ground(scene, rng)
    silent = scene.place == "centre" and rng.random() < 0.5
    place = "" if silent else say_place(scene.place, rng)
    choice = rng.random()
    if choice < 0.05:
        size, colour = _size(thing, rng), rng.choice(COLOUR_WORDS[thing.colour])
        plain = article(f"{colour} {shape_word(thing.shape, rng)}")
        return _join(", ", plain, size, place, ground)
    noun = _noun(thing, rng)
    named = article(noun)
    if choice < 0.12:
        named = f"{rng.choice(COUNT_WORDS[1])} {noun}"
    elif choice < 0.2:
        named = noun
    if place and rng.random() < 0.15:
        return _framed(f"{place}{rng.choice((', ', ' '))}{named}", ground, rng)
    if place and ground and rng.random() < 0.35:
        return _join(rng.choice((" ", ", ")), _framed(named, ground, rng), place)
    return _framed(_join(rng.choice((" ", " ", ", ")), named, place), ground, rng)


def _say_relation(scene: Scene, rng: random.Random) -> str:
    first, second = (article(_noun(thing, rng)) for thing in scene.things)
    words = rng.choice(RELATION_WORDS[scene.relation])
    here, there = ENDS[scene.relation]
    forms = [f"{first} {words} {second}"] * 5
    forms += [f"{first} {here} and {second} {there}", f"{first} {here}, {second} {there}"]
    forms += [f"{here} {first}, {there} {second}", f"{first} is {words} {second}"]
    forms += [f"{words} {second} is {first}", f"{words} {second}, {first}"]
    if scene.relation == "left of":
        forms += [f"{first} and {second}", f"{first} next to {second}", f"{first} beside {second}"]
        forms += [f"{first} and {second} side by side"]
    if scene.relation == "above":
        forms += [f"{first} with {second} {rng.choice(('below', 'under', 'beneath'))} it"]
    if scene.relation == "below":
        forms += [f"{first} with {second} above it"]
    return _framed(rng.choice(forms), _ground(scene, rng), rng)


def _say_count(scene: Scene, rng: random.Random) -> str:
    noun = _noun(scene.things[0], rng, plural=True)
    return _framed(f"{rng.choice(COUNT_WORDS[scene.count])} {noun}", _ground(scene, rng), rng)


def _noise_word(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))


def _join(separator: str, *parts: str) -> str:
    return separator.join(part for part in parts if part)


assert set(SHAPE_WORDS) == set(SHAPES)
