"""Weights on words of a prompt, in the syntax that A1111's web UI made common.

    (word)  x 1.1     (word:1.3)  x 1.3     [word]  / 1.1     \\( \\) \\[ \\] \\\\  are themselves

They nest, and multiply. A bracket that nothing closes weighs to the end of the prompt; one that
nothing opened is text. The embeddings of a word's tokens are multiplied by its weight after the
text was encoded, and no mean is restored: that is A1111's "No norm". Its older mode restores the
mean of the embeddings, which for T5 is close to nothing (0.06 of a standard deviation for a prompt
of the demo model): two words of four at 1.3 would scale all of them by 0.80. ComfyUI instead goes
away from the embeddings of an empty prompt, which costs a text more. Imports no torch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import takewhile

from lowvram.errors import RequestError

ROUND, SQUARE = 1.1, 1 / 1.1
MOST = 10.0

_PIECES = re.compile(
    r"""\\[()\[\]\\]                                 # escaped
    |   :\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)  # closes what ( opened
    |   [()\[\]]
    |   [^\\()\[\]:]+ | \\ | :                        # text""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Segment:
    """A part of a prompt whose words weigh the same."""

    text: str
    weight: float


def parse(prompt: str) -> list[Segment]:
    """The prompt without its syntax, in parts of one weight; neighbours differ in it.

    Raises:
        RequestError: a weight is not between 0 and 10.
    """
    found: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, weight: float) -> None:
        found[start:] = [(text, before * weight) for text, before in found[start:]]

    for piece in _PIECES.finditer(prompt):
        text = piece[0]
        if text in opened:
            opened[text].append(len(found))
        elif piece["weight"] is not None and opened["("]:
            multiply(opened["("].pop(), float(piece["weight"]))
        elif piece["weight"] is not None:
            found.append((text, 1.0))
        elif text == ")" and opened["("]:
            multiply(opened["("].pop(), ROUND)
        elif text == "]" and opened["["]:
            multiply(opened["["].pop(), SQUARE)
        else:
            found.append((text[1:] if len(text) == 2 and text[0] == "\\" else text, 1.0))
    for start in opened["("]:
        multiply(start, ROUND)
    for start in opened["["]:
        multiply(start, SQUARE)
    return _merged(found)


def _merged(found: Sequence[tuple[str, float]]) -> list[Segment]:
    segments: list[Segment] = []
    for text, exact in found:
        weight = round(exact, 6)  # ([word]) is 1 again
        if not 0 <= weight <= MOST:
            raise RequestError(
                f"the weight {weight:g} of “{text.strip()[:40]}” is out of range: 0 to {MOST:g}"
            )
        if segments and segments[-1].weight == weight:
            segments[-1] = Segment(segments[-1].text + text, weight)
        else:
            segments.append(Segment(text, weight))
    return segments


def plain(segments: Sequence[Segment]) -> str:
    """The words alone."""
    return "".join(segment.text for segment in segments)


def of_characters(segments: Sequence[Segment], text: str) -> list[float]:
    """The weight of each character of a text that was made of the words, by cleaning it.

    Args:
        text: the beginning of what was made of them, if no more is needed: long ones take long.

    The text is cleaned as a whole, so that it is the one that the words alone would give; the
    weights then follow what became of their characters.
    """
    # lower() as cleaning does; it can make two characters of one.
    before = [(c, each.weight) for each in segments for char in each.text for c in char.lower()]
    if not before:
        return [1.0] * len(text)
    letters = "".join(char for char, _ in before)
    pairs = zip(letters, text, strict=False)
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))  # mostly all of it
    weights = [weight for _, weight in before[:same]]
    matcher = SequenceMatcher(None, letters[same:], text[same:], autojunk=False)
    for _, start, end, to, until in matcher.get_opcodes():
        for index in range(until - to):  # in proportion, where one thing became another
            at = same + start + index * max(end - start, 1) // (until - to)
            weights.append(before[min(at, len(before) - 1)][1])
    return weights


def of_tokens(
    weights: Sequence[float], text: str, spans: Sequence[tuple[int, int]]
) -> tuple[float, ...]:
    """The weight of each token: that of most of its characters.

    Args:
        weights: of each character of the text.
        spans: of each token in it; empty for control tokens and padding, which weigh 1.
    """
    return tuple(_of_span(weights, text, *span) for span in spans)


def _of_span(weights: Sequence[float], text: str, start: int, end: int) -> float:
    inside = [weights[i] for i in range(start, end) if not text[i].isspace()]
    inside = inside or list(weights[start:end])
    return max(inside, key=inside.count) if inside else 1.0
