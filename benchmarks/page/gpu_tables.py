"""gpu.json as tables, one for each part."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.page.gpu import STAGES, Entry, entries, step_ratios
from benchmarks.page.tables import (
    NONE,
    NOT_RECORDED,
    gigabytes,
    measured_on,
    noted,
    seconds,
    share,
    table,
)  # fmt: skip

_PARTS = {
    "first": "From the command to the first picture",
    "prepared": "The same with a prepared checkpoint",
    "many": "Several prompts",
    "memory": "Peaks under a cap",
    "streaming": "A step: weights that stream, and weights that stay",
    "throttled": "The same with a bus, blocks and disks as slow as on consumer cards",
    "predicted": "Foretold and measured",
    "checkpoint": "Writing the checkpoint",
}
_STEPS = ("streaming", "throttled")


def body(document: Mapping[str, Any]) -> str:
    """Each part that was measured; rows of other parts last, so that none is left out."""
    found = entries(document)
    names = [*_PARTS, *sorted({entry.part for entry in found} - set(_PARTS))]
    parts = [_measured(document), noted(document)]
    for name in names:
        of_part = [entry for entry in found if entry.part == name]
        if of_part:
            parts += [f"### {_PARTS.get(name, name)}\n", _part(name, of_part)]
    return "\n".join(parts)


def _part(name: str, found: list[Entry]) -> str:
    if name in _STEPS:
        return _steps(name, found)
    if name == "predicted":
        return _predicted(found)
    return _contenders(found)


def _contenders(found: Sequence[Entry]) -> str:
    """Peaks by stage, and of the whole run; seconds where the run was alone on the machine."""
    titles = (
        "contender", "px", "pictures", "page cache", "allocated: encode", "denoise", "decode",
        "reserved", "process", "RAM", "anonymous", "read", "first picture", "further picture",
        "whole run",
    )  # fmt: skip
    return table(titles, (_contender(entry) for entry in found))


def _contender(entry: Entry) -> Iterator[str]:
    yield _name(entry)
    yield from (str(entry.size or NONE), str(entry.pictures or NONE), entry.cache or NONE)
    if not entry.ok:
        yield from (str(entry.row.get("error")), *[NONE] * 10)
        return
    yield from (gigabytes(entry.stage(n).get("peak_allocated_bytes")) for n in STAGES)
    for name in ("reserved", "process", "rss", "anonymous"):
        yield gigabytes(entry.peak(f"peak_{name}_bytes"))
    whole = entry.stage("all")
    yield gigabytes(whole.get("read_bytes") or entry.row.get("bytes"))
    timed = entry.row.get("timed", True)
    for value in (
        entry.row.get("seconds_to_first_picture"),
        entry.row.get("seconds_per_further_picture"),
        whole.get("seconds") or entry.row.get("wall_seconds"),
    ):
        yield seconds(value) if timed else NONE


def _steps(part: str, found: list[Entry]) -> str:
    ratios = step_ratios(found, part)
    titles = ("what", "px", "a step", "to resident", "encoding", "reading alone", "allocated")
    return table(titles, (_step(entry, ratios) for entry in found))


def _step(entry: Entry, ratios: Mapping[str, float]) -> Iterator[str]:
    yield " / ".join([entry.what, *entry.also])
    yield str(entry.size)
    if not entry.ok:
        yield from (str(entry.row.get("error")), *[NONE] * 4)
        return
    row = entry.row
    taken = row.get("seconds_per_step")
    yield NONE if taken is None else f"{taken * 1e3:.1f} ms"
    yield f"{ratios[entry.key]:.3f}" if entry.key in ratios else NONE
    yield from (seconds(row.get(name)) for name in ("seconds", "seconds_of_reading_alone"))
    yield gigabytes(row.get("peak_allocated_bytes"))


def _predicted(found: list[Entry]) -> str:
    names = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_process_bytes")
    titles = ["stage", "px"]
    for name in ("allocated", "reserved", "process"):
        titles += [f"{name}, foretold", "measured", "difference"]
    lines = []
    for entry in found:
        line = [entry.what, str(entry.size)]
        stage = next(iter(entry.stages), {})
        line += [] if entry.ok else [str(entry.row.get("error")), *[NONE] * 8]
        for name in names if entry.ok else ():
            foretold, measured = (stage.get("predicted") or {}).get(name), stage.get(name)
            apart = measured / foretold - 1 if foretold and measured else None
            line += [gigabytes(foretold), gigabytes(measured), share(apart)]
        lines.append(line)
    return table(titles, lines)


def _name(entry: Entry) -> str:
    """Its name, and where its output was not that of the others."""
    return entry.name + (", another output" if entry.row.get("agrees") is False else "")


def _measured(document: Mapping[str, Any]) -> str:
    """Each machine, with the days of its rows."""
    machines: Mapping[str, Mapping[str, Any]] = document.get("machines") or {}
    lines = []
    for key, facts in machines.items():
        days = sorted(
            str(row.get("measured"))[:10]
            for row in document["rows"].values()
            if row.get("machine") == key
        )
        about = facts if "machine" in facts else {"machine": facts, "versions": facts}
        date = " to ".join(dict.fromkeys((days[0], days[-1]))) if days else NOT_RECORDED
        lines.append(measured_on({**about, "date": date}))
    return "\n".join(lines)
