"""Reads a prompt in the demo's own words back into what it asks for: the inverse of `caption`.

A text that holds anything besides is not read at all: what "a blue star, but no red" asks for, no
rule here knows.
"""

import re

from .scenes import COLOURS, SHAPES

ATTRIBUTES = ("shape", "colour", "background", "place", "size")  # as in `Scene.said`

_COLOUR = "|".join(COLOURS)
_CENTRE = "centre|center|middle"
_SHAPE_WORDS = {
    "heart shape": "heart", "five-pointed star": "star", "plus sign": "cross", "disc": "circle",
    **{shape: shape for shape in SHAPES},
}  # fmt: skip
_SIZE_WORDS = {
    "medium-sized": "medium", "medium": "medium", "small": "small", "tiny": "small",
    "little": "small", "large": "large", "big": "large", "huge": "large",
}  # fmt: skip
_ROWS = {"top": "top", "upper": "top", "bottom": "bottom", "lower": "bottom"}
_GROUND = (
    rf"(?:(?:on|over|against) )?(?:an? )?(?P<ground>{_COLOUR}) (?:background|backdrop)",
    rf"on (?P<ground>{_COLOUR})",
)
_PLACE = (
    rf"(?P<row>{'|'.join(_ROWS)}) (?P<column>left|right)(?: corner)?",
    rf"(?P<row>{'|'.join(_ROWS)})(?: (?:{_CENTRE}))?",
    rf"(?:{_CENTRE}) (?P<side>left|right)",
    r"(?P<side>left|right)(?: side)?",
    rf"(?P<centre>{_CENTRE})",
)
_MAY_REMAIN = {"a", "an", "the", "in", "on", "at", "of", "with", "picture", "image", "drawing"}


def asked(prompt: str) -> dict[str, str] | None:
    """What a prompt asks for, by the names in `ATTRIBUTES`; what it leaves open is left out.

    Returns:
        None where it is not wholly in the demo's words, or names a thing twice.
    """
    text = " ".join(re.sub(r"[,.]", " , ", prompt.lower()).split())
    found: dict[str, str] = {}
    text, ground = _take(text, _GROUND)
    text, shape = _take(text, (rf"(?P<shape>{'|'.join(_SHAPE_WORDS)})",))
    text, size = _take(text, (rf"(?P<size>{'|'.join(_SIZE_WORDS)})",))
    text, colour = _take(text, (rf"(?P<colour>{_COLOUR})",))
    text, place = _take(text, _PLACE)
    if not shape or not set(text.replace(",", " ").split()) <= _MAY_REMAIN:
        return None
    found["shape"] = _SHAPE_WORDS[shape["shape"]]
    found |= colour
    if ground:
        found["background"] = ground["ground"]
    if place:
        found["place"] = _place(place)
    if size:
        found["size"] = _SIZE_WORDS[size["size"]]
    return found


def _take(text: str, patterns: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """The text without the first match of the first pattern that has one, and its groups."""
    for pattern in patterns:
        match = re.search(rf"(?<![\w-])(?:{pattern})(?![\w-])", text)
        if match:
            groups = {name: word for name, word in match.groupdict().items() if word}
            return f"{text[: match.start()]},{text[match.end() :]}", groups
    return text, {}


def _place(groups: dict[str, str]) -> str:
    if "side" in groups:
        return groups["side"]
    if "centre" in groups:
        return "centre"
    return " ".join(filter(None, [_ROWS[groups["row"]], groups.get("column")]))
