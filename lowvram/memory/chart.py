"""What a chart of one stage shows, whoever draws it: lines over time, levels, marks, axes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Colours that colour-blind people can tell apart (Okabe and Ito, "Color Universal Design", 2008);
# the second of each is for dark grounds.
COLOURS = {
    "allocated": ("#0072b2", "#56b4e9"),
    "reserved": ("#8a4f8f", "#cc79a7"),
    "process": ("#b26a00", "#e69f00"),
    "device": ("#666666", "#aaaaaa"),
    "rss": ("#00785a", "#2fc79b"),
    "disk_read": ("#8a7a00", "#f0e442"),
    "budget": ("#c24100", "#ff8a4c"),
}
TITLES = {"rss": "RAM (RSS)", "disk_read": "read from disk"}
_MEMORY = ("allocated", "reserved", "process", "device", "rss")
PHASES = ("load", "compute", "release")
# A budget much above everything else would press it flat: it is then only named.
_MOST_TIMES_ABOVE = 3


@dataclass(frozen=True)
class Line:
    """One counter over time: (seconds, bytes)."""

    name: str
    points: list[tuple[float, float]]

    @property
    def top(self) -> float:
        """Its peak, bytes."""
        return max(y for _, y in self.points)


@dataclass(frozen=True)
class Level:
    """A number that was foretold, or the budget: bytes. `name` is its line's, or "budget"."""

    name: str
    bytes: float

    @property
    def title(self) -> str:
        """For people."""
        return "budget" if self.name == "budget" else f"predicted {title(self.name)}"


@dataclass(frozen=True)
class Chart:
    """One stage.

    Attributes:
        levels: shown; those too high to be shown are in `above`.
        disk: bytes read so far, over time; None where it is not known or nothing was read.
    """

    stage: str
    seconds: float
    top: float
    lines: list[Line]
    levels: list[Level]
    above: list[Level]
    marks: list[tuple[float, str]]
    disk: Line | None


def chart(stage: Mapping[str, Any]) -> Chart:
    """The chart of a stage's report; without lines where the report is of an older version."""
    lines = {line.name: line for line in _lines(stage.get("timeline") or {})}
    memory = [lines[name] for name in _MEMORY if name in lines]
    levels = _levels(stage, {line.name for line in memory})
    highest = max((line.top for line in memory), default=0.0)
    shown = [each for each in levels if each.bytes <= highest * _MOST_TIMES_ABOVE]
    disk = lines.get("disk_read")
    marks = [(float(at), str(name)) for at, name in stage.get("marks") or []]
    ends = [line.points[-1][0] for line in lines.values()] + [at for at, _ in marks]
    return Chart(
        stage=str(stage["stage"]),
        seconds=max(max(ends, default=0.0), 1e-3),
        top=max([highest, *(each.bytes for each in shown), 1.0]) * 1.08,
        lines=memory,
        levels=shown,
        above=[each for each in levels if each not in shown],
        marks=marks,
        disk=disk if disk is not None and disk.top > 0 else None,
    )


def title(name: str) -> str:
    """A line's name for people."""
    return TITLES.get(name, name)


def ticks(top: float, about: int = 5) -> list[float]:
    """Round numbers from 0 up to `top`, about so many: multiples of 1, 2 or 5 times a ten."""
    if top <= 0:
        return [0.0]
    rough = top / about
    ten = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * ten for factor in (1, 2, 5, 10) if factor * ten >= rough)
    return [index * step for index in range(int(top / step) + 1)]


def _lines(timeline: Mapping[str, Any]) -> list[Line]:
    lines = []
    for index, column in enumerate(timeline.get("columns") or []):
        rows = timeline.get("rows") or []
        points = [(float(row[0]), float(row[index])) for row in rows if row[index] is not None]
        name = column.removesuffix("_bytes")
        if index > 0 and points and name in COLOURS:
            lines.append(Line(name, points))
    return lines


def _levels(stage: Mapping[str, Any], drawn: set[str]) -> list[Level]:
    predicted = stage.get("predicted") or {}
    levels = [
        Level(name, float(predicted[key]))
        for name in _MEMORY
        if name in drawn and predicted.get(key := f"peak_{name}_bytes") is not None
    ]
    budget = stage.get("budget_bytes")
    return levels if budget is None else [*levels, Level("budget", float(budget))]
