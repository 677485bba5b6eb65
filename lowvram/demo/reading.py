"""Reads a prompt in the demo's own words back into what it asks for: the inverse of `caption`.

A text that holds anything besides is not read at all: what "a blue star, but no red" asks for, no
rule here knows. Imports no torch.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .captions import (
    COLOUR_WORDS,
    COUNT_WORDS,
    GROUND_WORDS,
    MIDDLE_WORDS,
    PREFIXES,
    RELATION_WORDS,
    ROW_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
)
from .scenes import COLOURS, LAYOUTS, PLACES, RELATIONS, SHAPES, SIZES, Point, Scene

VOCABULARY = (
    f"the demo model draws {', '.join(SHAPES)} in {', '.join(COLOURS)}; {', '.join(SIZES)}; "
    f"at the {', '.join(PLACES)}; "
    f"one to four of them, or two different ones: {', '.join(RELATIONS)}; on a coloured background"
)
ATTRIBUTES = ("background", "count", "shape", "colour", "size", "place", "relation")


@dataclass(frozen=True)
class Wanted:
    """An object that is asked for; None for what may be any."""

    shape: str | None
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for; None for what it leaves open.

    Attributes:
        things: one, or two different ones.
        count: how often the one thing shall be there.
        place: of a single thing.
        relation: of the first of two things to the second.
    """

    things: tuple[Wanted, ...]
    background: str | None = None
    count: int = 1
    place: str | None = None
    relation: str | None = None

    @classmethod
    def of(cls, scene: Scene) -> "Asked":
        """Everything that a scene says."""
        return cls(
            tuple(Wanted(thing.shape, thing.colour, thing.size) for thing in scene.things),
            scene.background,
            scene.count,
            scene.place if scene.kind == "place" else None,
            scene.relation or None,
        )

    @property
    def objects(self) -> tuple[Wanted, ...]:
        """Each object that shall be in the picture."""
        return self.things * self.count

    @property
    def centres(self) -> tuple[Point, ...]:
        """Where they belong, in shares of the canvas; empty where that is open."""
        if self.relation:
            return RELATIONS[self.relation]
        if self.place:
            return (PLACES[self.place],)
        return LAYOUTS.get(self.count, ())


def _names(words: dict[str, Iterable[str]]) -> dict[str, str]:
    return {word: name for name, each in words.items() for word in each}


_COLOURS = _names(dict(COLOUR_WORDS))
_SIZES = _names(dict(SIZE_WORDS))
_SINGULARS = _names({shape: [pair[0] for pair in each] for shape, each in SHAPE_WORDS.items()})
_PLURALS = _names({shape: [pair[1] for pair in each] for shape, each in SHAPE_WORDS.items()})
_COUNTS = {word: number for number, each in COUNT_WORDS.items() for word in each}
_RELATIONS = _names(dict(RELATION_WORDS))
_ROWS = _names(dict(ROW_WORDS))
_SIDES = {("left", "right"): "left of", ("right", "left"): "right of"} | {
    ("top", "bottom"): "above", ("bottom", "top"): "below",
}  # fmt: skip
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _any(words: Iterable[str]) -> str:
    """A pattern for one of the words, the longest that fits."""
    return "|".join(re.escape(word) for word in sorted(set(words), key=len, reverse=True))


_COLOUR, _MIDDLE, _GROUND_NOUN = _any(_COLOURS), _any(MIDDLE_WORDS), _any(GROUND_WORDS)
_GROUND = re.compile(
    rf"(?<![\w-])(?<!in )(?:(?:on|over|against|with|in front of) )?(?:an? )?"
    rf"(?:(?P<before>{_COLOUR}) (?:{_GROUND_NOUN})|(?:{_GROUND_NOUN}) of (?P<after>{_COLOUR}))"
    rf"(?![\w-])|(?<![\w-])on (?P<on>{_COLOUR})(?![\w-])"
)
_PLACE = (
    rf"(?:(?:in|on|at) )?(?:the )?(?:(?P<row>{_any(_ROWS)})(?: (?:(?P<column>left|right)"
    rf"(?: corner)?|(?:{_MIDDLE})))?|(?:(?:{_MIDDLE}) )?(?P<side>left|right)(?: side)?"
    rf"|(?P<middle>{_MIDDLE}))"
)
# One letter for each kind of word, so that sentences are patterns of letters. In this order: "on
# the left of" before "on the left", "a pair of" before "a".
_KINDS = {
    "R": _any(_RELATIONS),
    "N": _any(_COUNTS),
    "Z": "side by side",
    "B": "next to|beside",
    "P": _PLACE,
    "K": rf"in (?:{_COLOUR})",
    "C": _COLOUR,
    "S": _any(_SIZES),
    "Q": _any(_PLURALS),
    "H": _any(_SINGULARS),
    "A": "an?",
    "E": "and",
    "I": "is",
    "W": "with",
    "T": "it",
}
_SMALL = "AEIWT"  # say nothing by themselves
_WORD = re.compile("|".join(rf"(?P<{kind}>(?:{words})(?![\w-]))" for kind, words in _KINDS.items()))
_ONE = "[AN]?(?:(?:S?C|CS)H|S?HK?)"
_SINGLE = re.compile(f"P?(?P<one>{_ONE})(?:S?P?|P?S?)")
_SEVERAL = re.compile("(?P<one>N(?:(?:S?C|CS)Q|S?QK?))")
_PAIRS = (
    re.compile(f"(?P<one>{_ONE})I?R(?P<two>{_ONE})"),
    re.compile(f"R(?P<two>{_ONE})I?(?P<one>{_ONE})"),
    re.compile(f"(?P<one>{_ONE})PE?(?P<two>{_ONE})P"),
    re.compile(f"P(?P<one>{_ONE})E?P(?P<two>{_ONE})"),
    re.compile(f"(?P<one>{_ONE})(?:EZ?|B)(?P<two>{_ONE})Z?"),
    re.compile(f"(?P<one>{_ONE})W(?P<two>{_ONE})RT"),
)
_KNOWN = re.compile(
    rf"(?<![\w-])(?:{_any((*_COLOURS, *_SIZES, *_SINGULARS, *_PLURALS, *_ROWS, *GROUND_WORDS))}"
    rf"|{_any((*MIDDLE_WORDS, 'left', 'right'))})(?![\w-])"
)


def understands(prompt: str) -> bool:
    """Whether the demo knows a shape, colour, size or place of it, or all of its words: "two" alone
    says something, and "one day" does not.
    """
    text = _plain(prompt)
    said = any(kind not in _SMALL for kind, _ in _words(text))
    return said or _KNOWN.search(text) is not None


def asked(prompt: str) -> Asked | None:
    """What a prompt asks for.

    Returns:
        None where it is not wholly in the demo's words, names no shape, or says a thing twice.
    """
    text = _plain(prompt)
    for prefix in PREFIXES:
        text = text.removeprefix(f"{prefix} ")
    grounds = list(_GROUND.finditer(text))
    if len(grounds) > 1:
        return None
    said = [match["before"] or match["after"] or match["on"] for match in grounds]
    background = _COLOURS[said[0]] if said else None
    words = _words(_GROUND.sub(" , ", text))
    return _sentence(words, background) if words else None


def _plain(prompt: str) -> str:
    return " ".join(re.sub(r"[,.!]", " , ", prompt.lower()).split())


def _words(text: str) -> list[tuple[str, str]]:
    """Kind and value of each word or phrase; empty where one is not known."""
    found, at = [], 0
    while at < len(text):
        if text[at] in " ,":
            at += 1
            continue
        match = _WORD.match(text, at)
        if match is None:
            return []
        kind = match.lastgroup or ""
        if match["P"]:
            kind = "P"
        found.append((kind, _place(match) if kind == "P" else match[kind]))
        at = match.end()
    return found


def _place(match: re.Match[str]) -> str:
    if match["middle"]:
        return "centre"
    if match["side"]:
        return match["side"]
    return " ".join(filter(None, [_ROWS[match["row"]], match["column"]]))


def _sentence(words: list[tuple[str, str]], background: str | None) -> Asked | None:
    letters = "".join(kind for kind, _ in words)
    said = [value for _, value in words]
    places = [value for kind, value in words if kind == "P"]
    sizes = [value for kind, value in words if kind == "S"]
    if match := _SINGLE.fullmatch(letters):
        thing, count = _thing(words, match.span("one"))
        if len(places) > 1 or len(sizes) > 1 or count != 1:
            return None
        size = _SIZES[sizes[0]] if sizes else None
        thing = Wanted(thing.shape, thing.colour, size)
        return Asked((thing,), background, 1, places[0] if places else None)
    if match := _SEVERAL.fullmatch(letters):
        thing, count = _thing(words, match.span("one"))
        return Asked((thing,), background, count) if count > 1 else None
    for pattern in _PAIRS:
        if match := pattern.fullmatch(letters):
            (first, one), (second, other) = (_thing(words, match.span(n)) for n in ("one", "two"))
            relation = _relation(letters, said, places)
            if one != 1 or other != 1 or relation == "":
                return None
            return Asked((first, second), background, 1, None, relation)
    return None


def _relation(letters: str, said: list[str], places: list[str]) -> str | None:
    """Of the first thing to the second; None where that is open, "" where it makes no sense."""
    if "R" in letters:
        relation = _RELATIONS[said[letters.index("R")]]
        return _OPPOSITE[relation] if letters.endswith("T") else relation  # with … below it
    if places:
        return _SIDES.get((places[0], places[1]), "")
    return None


def _thing(words: list[tuple[str, str]], span: tuple[int, int]) -> tuple[Wanted, int]:
    """The object that a part of the sentence names, and how many of it."""
    said = dict(words[slice(*span)])
    shape = _SINGULARS[said["H"]] if "H" in said else _PLURALS[said["Q"]]
    colour = said.get("C") or said.get("K", "").removeprefix("in ")
    size = said.get("S")
    return (
        Wanted(shape, _COLOURS.get(colour), _SIZES[size] if size else None),
        _COUNTS[said["N"]] if "N" in said else 1,
    )
