"""The ways of working that are compared: the first is the reference, each other differs once.

One thing at a time, so that what a row shows has one cause: `encoder_weights` whole, 4bit and
`decode` whole, strips give a reference and two variants, not four.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from lowvram.errors import RequestError
from lowvram.request.checks import one_of
from lowvram.request.decode import DECODES
from lowvram.request.denoise import TRANSFORMER_WEIGHTS
from lowvram.request.encode import DTYPES, WEIGHTS

REFERENCE = "reference"


class Vary(TypedDict, total=False):
    """What is varied: options of a run, by its names, each with the values to try."""

    encoder_weights: Sequence[str]
    transformer_weights: Sequence[str]
    decode: Sequence[str]
    dtype: Sequence[str]


# By the option's name: what a variant is called after, the option, the values that it may have.
AXES = {
    "encoder_weights": ("encoder", "--weights", WEIGHTS),
    "transformer_weights": ("transformer", "--transformer-weights", TRANSFORMER_WEIGHTS),
    "decode": ("decode", "--decode", DECODES),
    "dtype": ("dtype", "--dtype", DTYPES),
}


@dataclass(frozen=True)
class Variant:
    """One way of working.

    Attributes:
        name: "reference", or what differs from it: "encoder 4bit".
        options: of a run: what is varied, and its value here.
    """

    name: str
    options: dict[str, str]

    @property
    def title(self) -> str:
        """What it is called where it stands alone: "reference: encoder whole, decode whole"."""
        if self.name != REFERENCE:
            return self.name
        said = ", ".join(f"{AXES[axis][0]} {value}" for axis, value in self.options.items())
        return f"{self.name}: {said}"

    @property
    def slug(self) -> str:
        """For file names."""
        return self.name.replace(" ", "-")


def variants(vary: Vary, fixed: Mapping[str, Any]) -> list[Variant]:
    """The reference, then the others, in the order in which they are named.

    Args:
        fixed: the options of a run that all share.

    Raises:
        RequestError: an unknown value, one named twice, or nothing to compare.
        TypeError: what is to be varied is none of `Vary`.
    """
    given: dict[str, Any] = dict(vary)
    unknown = set(given) - set(AXES)
    if unknown:
        raise TypeError(f"vary has no {min(unknown)!r}: it may hold {', '.join(AXES)}")
    named: dict[str, Sequence[str]] = {axis: given[axis] for axis in AXES if axis in given}
    for axis, values in named.items():
        _, option, allowed = AXES[axis]
        if axis in fixed:
            raise RequestError(f"{axis} is both varied and fixed: give it once")
        for value in values:
            one_of(option, value, allowed)
        if len(set(values)) < len(values):
            raise RequestError(f"{option} {','.join(values)} names one twice: name each once")
    if not any(len(values) > 1 for values in named.values()):
        raise RequestError(
            "nothing to compare: name two or more with --weights, --transformer-weights, "
            "--decode or --dtype, for example --weights whole,8bit,4bit"
        )
    first = {axis: values[0] for axis, values in named.items() if values}
    others = [
        Variant(f"{AXES[axis][0]} {value}", {**first, axis: value})
        for axis, values in named.items()
        for value in values[1:]
    ]
    return [Variant(REFERENCE, first), *others]
