"""What came of a contender, and how a failure is said."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram.errors import first_line, is_out_of_memory

_LONGEST = 300  # characters of a reason


class Failed(Exception):
    """A contender that could not: its message is the row's error."""


@dataclass(frozen=True)
class Outcome:
    """What a contender made.

    Attributes:
        rows: of its stages, and "all" last.
        started: when the process began, seconds since the epoch.
        pictures: in the order of the prompts.
        latents: file of all of them; None where finished ones were given.
    """

    rows: list[dict[str, Any]]
    started: float
    pictures: list[Path]
    latents: Path | None

    def seconds_to_first(self) -> float:
        """From the start of the process, imports included, until the first picture was written."""
        return min(self._written()) - self.started

    def seconds_per_further(self) -> float | None:
        """Between the first picture and the last, for each after the first; None for one picture.

        Where all prompts go through one stage before any enters the next, most of the work lies
        before the first picture: compare seconds of the whole ("all") over several counts then.
        """
        written = self._written()
        if len(written) < 2:
            return None
        return (max(written) - min(written)) / (len(written) - 1)

    def _written(self) -> list[float]:
        return [path.stat().st_mtime for path in self.pictures]


def error_of(error: BaseException, stage: str) -> str:
    """One line: "out of memory at STAGE", or "cannot: REASON"."""
    if isinstance(error, Failed):
        return str(error)
    if is_out_of_memory(error):
        return f"out of memory at {stage}"
    return f"cannot: {type(error).__name__}: {first_line(error)}"[:_LONGEST]
