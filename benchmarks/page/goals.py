"""The goals for 1024 px, 20 steps, with guidance and the same weights: met, or missed by how much.

A goal whose figure stands in no result file is "not measured"; nothing is assumed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.page import cpu, cuda, gpu
from benchmarks.page.tables import gigabytes, table

Results = Mapping[str, Mapping[str, Any]]  # by the name of the file
NOT_MEASURED = "not measured"
_TIMES = "{:.2f}".format


@dataclass(frozen=True)
class Figure:
    """A measured value; None for none.

    Attributes:
        published: the published recipe's: a value, or how it failed.
        foretold: what the stage that needs most would hold in its smallest budget.
    """

    value: float | None
    where: str
    published: float | str | None = None
    foretold: float | None = None


@dataclass(frozen=True)
class Goal:
    """What is to be reached.

    Attributes:
        bound: the value to stay below, or to reach where `at_least`.
        measure: its figure from the results; None where there is none.
    """

    name: str
    bound: float
    measure: Callable[[Results], Figure | None]
    shown: Callable[[float], str] = gigabytes
    at_least: bool = False


def goals_table(results: Results) -> str:
    """Every goal with what was measured."""
    titles = (
        "goal",
        "bound",
        "published 8-bit recipe",
        "`lowvram`",
        "missed by",
        "measured in",
        "foretold, at the least",
    )
    return table(titles, (_row(goal, results) for goal in GOALS))


def unmeasured(results: Results) -> list[str]:
    """Names of the goals without a figure."""
    figures = {goal.name: goal.measure(results) for goal in GOALS}
    return [name for name, figure in figures.items() if figure is None or figure.value is None]


def _row(goal: Goal, results: Results) -> Iterator[str]:
    yield goal.name
    yield ("≥ " if goal.at_least else "≤ ") + goal.shown(goal.bound)
    figure = goal.measure(results) or Figure(None, "–")
    theirs = figure.published
    yield (
        theirs
        if isinstance(theirs, str)
        else NOT_MEASURED
        if theirs is None
        else goal.shown(theirs)
    )
    if figure.value is None:
        yield from (NOT_MEASURED, "–", figure.where)
    else:
        yield goal.shown(figure.value)
        over = goal.bound - figure.value if goal.at_least else figure.value - goal.bound
        yield f"{goal.shown(over)} ({over / goal.bound:.0%})" if over > 0 else "met"
        yield figure.where
    yield "–" if figure.foretold is None else goal.shown(figure.foretold)


def _peak(field: str, size: int) -> Callable[[Results], Figure | None]:
    """The least peak of ours at that size, in a run or stage by stage; the published recipe's."""

    def measure(results: Results) -> Figure | None:
        found = gpu.entries(results.get("gpu", {}))
        both = [_of_run(found, field, size), _by_stage(results, field, size)]
        measured = [(figure.value, figure) for figure in both if figure.value is not None]
        least = min(measured, key=lambda each: each[0])[1] if measured else Figure(None, "–")
        figure = replace(least, published=gpu.least_peak(found, gpu.PUBLISHED, size, field))
        foretold = results.get("foretold", {}).get("rows") or []
        held = [r["predicted"].get(field) for r in foretold if r["side"] in (0, size)]
        return replace(figure, foretold=max(filter(None, held), default=None))

    return measure


def _of_run(found: list[gpu.Entry], field: str, size: int) -> Figure:
    """The least peak that a whole run has."""
    run = gpu.least_run(found, gpu.OURS, size, field)
    return Figure(None, "–") if run is None else Figure(run.peak(field), _where(size, run.name))


def _by_stage(results: Results, field: str, size: int) -> Figure:
    """The largest of the three stages, each run by itself in the way that holds least."""
    peaks = gpu.stage_peaks(gpu.entries(results.get("gpu", {})), size, field)
    if len(peaks) < len(gpu.STAGES):
        return Figure(None, "–")
    strips, also = cuda.strips_peak(results.get("cuda", {}), size), ""
    if field == "peak_allocated_bytes" and strips and strips < peaks["decode"][0]:
        peaks["decode"], also = (strips, "decode"), "; decode: cuda.json"
    value, way = max(peaks.values())
    return Figure(value, _where(size, f"stage by stage, most in {way}{also}"))


def _where(size: int, row: str) -> str:
    return f"gpu.json, {size} px, {row}"


def _host(results: Results) -> Figure | None:
    """Resident peak of a process on a GPU.

    A process without weights takes its part of that (libraries, and the context): that is taken
    off, where it was measured.
    """
    name = "peak_rss_bytes"
    found = _peak(name, 1024)(results)
    entries = gpu.entries(results.get("gpu", {}))
    bare = max((entry.peak(name) or 0 for entry in gpu.find(entries, gpu.BARE)), default=0)
    return _above(bare, found) if found and found.value is not None else found


def _host_on_cpu(results: Results) -> Figure | None:
    """The same where the host computes: weights and maps lie there too."""
    rows = results.get("cpu", {}).get("rows") or {}
    ours = [row for key, row in rows.items() if key.startswith("true/lowvram") and row["ok"]]
    peaks = [found for row in ours if (found := cpu.peak(row))]
    theirs = rows.get("true/published-8bit/n1", {})
    published = cpu.peak(theirs) if theirs.get("ok") else None
    bare = cpu.peak(rows.get("demo/interpreter", {})) or 0
    return _above(bare, Figure(min(peaks), "cpu.json, 512 px", published)) if peaks else None


def _above(bare: int, found: Figure) -> Figure:
    """A figure without what a process takes that holds nothing; 0 where that is not known."""
    if not bare:
        return replace(found, where=f"{found.where}, interpreter included")
    theirs = found.published
    return replace(
        found,
        value=None if found.value is None else found.value - bare,
        where=f"{found.where}, above {gigabytes(bare)} of libraries",
        published=theirs - bare if isinstance(theirs, float | int) else theirs,
    )


def _first_picture(part: str) -> Callable[[Results], Figure | None]:
    """Seconds from command to first picture, cold: ours to the published recipe's."""

    def measure(results: Results) -> Figure | None:
        found = gpu.entries(results.get("gpu", {}))
        ours = gpu.first_picture(found, gpu.OURS, part)
        theirs = gpu.first_picture(found, gpu.PUBLISHED, "first")
        return Figure(ours / theirs, "gpu.json, cold", 1.0) if ours and theirs else None

    return measure


def _own_step(results: Results) -> Figure | None:
    """The slowest streamed step to the resident one, as the card is."""
    ratios = gpu.step_ratios(gpu.entries(results.get("gpu", {})), "streaming")
    where = "gpu.json, 1024 and 2048 px; cuda.json has 512 px"
    return Figure(max(ratios.values()), where) if ratios else None


def _step(results: Results) -> Figure | None:
    """The slowest streamed step to the resident one, bus and blocks as slow as consumer cards'."""
    ratios = gpu.step_ratios(gpu.entries(results.get("gpu", {})), "throttled")
    slow = [ratio for key, ratio in ratios.items() if "block" in key]
    return Figure(max(slow), "gpu.json, throttled") if slow else None


def _throughput(results: Results) -> Figure | None:
    found = gpu.throughput_ratio(gpu.entries(results.get("gpu", {})))
    return Figure(found[0], f"gpu.json, {found[1]} prompts") if found else None


GOALS = (
    Goal("peak allocated, any stage, 1024 px", 0.5e9, _peak("peak_allocated_bytes", 1024)),
    Goal("the same, stretch", 0.27e9, _peak("peak_allocated_bytes", 1024)),
    Goal("process peak, context included, 1024 px", 1e9, _peak("peak_process_bytes", 1024)),
    Goal("peak allocated, 2048 px", 0.8e9, _peak("peak_allocated_bytes", 2048)),
    Goal("peak allocated, 4096 px", 2e9, _peak("peak_allocated_bytes", 4096)),
    Goal("host RAM peak above the interpreter", 2e9, _host),
    Goal("no goal of ours: the same on a CPU, which computes too", 2e9, _host_on_cpu),
    Goal("command to first picture, cold, prepared", 0.5, _first_picture("prepared"), _TIMES),
    Goal("command to first picture, cold, not prepared", 0.8, _first_picture("first"), _TIMES),
    Goal("a step, streamed to resident, consumer speed", 1.03, _step, _TIMES),
    Goal("no goal of ours: the same on the H100 itself", 1.03, _own_step, "{:.3f}".format),
    Goal(
        "100 prompts at 8 GiB, throughput to model offload", 3.0, _throughput, _TIMES, at_least=True
    ),
)
