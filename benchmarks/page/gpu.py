"""The rows of gpu.json by what their keys say, and the figures in them that the goals ask for.

A key is "first/lowvram budget 1 GiB/1024 px/1 picture/20 steps/cold/…" (benchmarks/side_by_side):
part, what ran and its bounds, side, pictures, steps or "decode only", state of the page cache, and
what else tells rows apart.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.side_by_side.rows import readable

Row = Mapping[str, Any]
PUBLISHED, OURS, OFFLOAD = "published-8bit", "lowvram", "model-offload"
BARE = "interpreter"
STAGES = ("encode", "denoise", "decode")
_BOUND = re.compile(r" (budget|stage-budget|limit) ([\d.e+]+) (GiB|MiB|GB)")
_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "GB": 10**9}
_CACHES = ("cold", "warm")


@dataclass(frozen=True)
class Entry:
    """A row, and what its key says of it.

    Attributes:
        what: contender, or the stage with its options.
        bounds: "budget", "stage-budget" and "limit" in bytes, those that were set.
        also: what is left of the key.
    """

    key: str
    row: Row
    part: str
    what: str
    bounds: Mapping[str, float]
    size: int
    pictures: int
    steps: int
    cache: str
    also: tuple[str, ...]

    @property
    def name(self) -> str:
        """What ran, in which bounds, and what else tells it from others."""
        bounds = [f"{name} {readable(round(value))}" for name, value in self.bounds.items()]
        return ", ".join([self.what, *bounds, *self.also])

    @property
    def ok(self) -> bool:
        """Whether it did what it was asked for."""
        return bool(self.row.get("ok"))

    @property
    def stages(self) -> list[Row]:
        """Its stages, "all" among them; a row of one step or encoding is its own only stage."""
        return list(self.row.get("stages") or ([self.row] if self.ok else []))

    def stage(self, name: str) -> Row:
        """The stage of that name; empty where there is none."""
        return next((each for each in self.stages if each.get("name") == name), {})

    def peak(self, name: str) -> int | None:
        """The largest of its stages, in bytes."""
        return max((each[name] for each in self.stages if each.get(name)), default=None)


def entries(document: Mapping[str, Any]) -> list[Entry]:
    """All rows; of one whose key is of another form only the part is known."""
    return [_entry(key, row) for key, row in (document.get("rows") or {}).items()]


def _entry(key: str, row: Row) -> Entry:
    part, *words = key.split("/")
    bounds = {
        name: float(n) * _UNITS[unit] for name, n, unit in _BOUND.findall(words[0] if words else "")
    }
    what = _BOUND.sub("", words[0]) if words else ""
    rest = words[1:]
    return Entry(
        key,
        row,
        part,
        what,
        bounds,
        _number(rest, " px"),
        _number(rest, " picture", " pictures"),
        _number(rest, " steps"),
        next((word for word in rest if word in _CACHES), ""),
        tuple(rest[4 if len(rest) > 3 and rest[3] in _CACHES else 3 :]),
    )


def _number(words: list[str], *endings: str) -> int:
    for word in words:
        for ending in endings:
            if word.endswith(ending) and word.removesuffix(ending).isdigit():
                return int(word.removesuffix(ending))
    return 0


def find(found: list[Entry], what: str, **fields: Any) -> Iterator[Entry]:
    """Entries of a contender that have these fields."""
    for entry in found:
        if entry.what == what and all(getattr(entry, n) == value for n, value in fields.items()):
            yield entry


def least_run(found: list[Entry], what: str, size: int, name: str) -> Entry | None:
    """The run of a contender at a size whose peak is smallest; None where none went well.

    Runs with quantised weights do not count for ours: the goals are for the same bits.
    """
    runs = [run for run in find(found, what, size=size) if run.ok and run.peak(name)]
    if what == OURS:
        runs = [run for run in runs if not any(_quantized(each) for each in run.stages)]
    return min(runs, key=lambda run: run.peak(name) or 0, default=None)


def least_peak(found: list[Entry], what: str, size: int, name: str) -> float | str | None:
    """The smallest peak of a contender's runs at a size; else how one failed; None without runs."""
    run = least_run(found, what, size, name)
    if run is not None:
        return run.peak(name)
    failed = (run for run in find(found, what, size=size) if not run.ok)
    return next((str(run.row.get("error")) for run in failed), None)


def stage_peaks(found: list[Entry], size: int, name: str) -> dict[str, tuple[float, str]]:
    """A peak of each stage of ours that was run by itself at a size, by the same bits, in the way
    that holds least, and which way that was. A text is of no size.
    """
    least: dict[str, tuple[Row, str]] = {}
    for entry in found:
        if entry.part != "predicted" or not entry.ok:
            continue
        for stage in entry.stages:
            if _quantized(stage) or (stage["name"] != "encode" and entry.size != size):
                continue
            before = least.get(stage["name"], ({}, ""))[0].get("peak_allocated_bytes")
            if before is None or stage["peak_allocated_bytes"] < before:
                least[stage["name"]] = stage, entry.name
    return {stage: (float(row[name]), way) for stage, (row, way) in least.items() if row.get(name)}


def first_picture(found: list[Entry], what: str, part: str) -> float | None:
    """Least seconds from the command to the first picture at 1024 px, from a cold page cache."""
    runs = find(found, what, part=part, size=1024, cache="cold")
    seconds = [run.row.get("seconds_to_first_picture") for run in runs if run.ok]
    return min((float(each) for each in seconds if each), default=None)


def step_ratios(found: list[Entry], part: str) -> dict[str, float]:
    """Seconds of a streamed step to those of a resident one, by the streamed row's key."""
    ratios = {}
    for entry in find(found, "denoise --weights stream", part=part):
        blocks = [word for word in entry.also if word.startswith("block")]
        resident = [
            each
            for each in find(found, "denoise --weights whole", part=part, size=entry.size)
            if [word for word in each.also if word.startswith("block")] == blocks
        ]
        pair = [each.row.get("seconds_per_step") for each in (entry, *resident[:1])]
        if len(pair) == 2 and all(pair):
            ratios[entry.key] = float(pair[0]) / float(pair[1])  # type: ignore[arg-type]
    return ratios


def throughput_ratio(found: list[Entry]) -> tuple[float, int] | None:
    """Ours at 8 GiB to model offload, in pictures a second, and of how many pictures ours was.

    Ours counts loading and imports, for all its pictures; offload a further picture alone.
    """
    ours = [
        (entry.pictures, float(taken))
        for entry in find(found, OURS, part="many", size=1024)
        if entry.bounds.get("budget") == 8 << 30 and (taken := entry.stage("all").get("seconds"))
    ]
    theirs = [
        float(seconds)
        for entry in find(found, OFFLOAD, part="many", size=1024)
        if (seconds := entry.row.get("seconds_per_further_picture"))
    ]
    if not (ours and theirs):
        return None
    pictures, taken = max(ours)
    return min(theirs) * pictures / taken, pictures


def _quantized(stage: Row) -> bool:
    return str(stage.get("weights") or "").endswith("bit")
