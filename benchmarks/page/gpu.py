"""gpu.json as tables, and the facts in it that the goals ask for.

A row is what `python -m benchmarks.baselines` prints, under a key of its own, with what
`benchmarks/gpu.py` adds; only fields that are there are used. Of several rows that fit, the last
one counts.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.page.tables import NONE, gigabytes, seconds, share, table

Row = Mapping[str, Any]
PUBLISHED, OURS, OFFLOAD = "published-8bit", "lowvram", "model-offload"
_PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_process_bytes", "peak_rss_bytes")
_GIB = 1 << 30


def rows_of(document: Mapping[str, Any]) -> dict[str, Row]:
    """The rows by key, also where a part keeps several under one key."""
    found: Mapping[str, Any] = document.get("rows") or {}
    return {key: row for key, row in found.items() if isinstance(row, Mapping)}


def whole(row: Row) -> Mapping[str, Any]:
    """The stage "all" of a row; empty where there is none."""
    return next((each for each in row.get("stages") or [] if each["name"] == "all"), {})


def peak(row: Row, name: str) -> int | None:
    """The largest of a row's stages, in bytes."""
    return max((each[name] for each in row.get("stages") or [] if each.get(name)), default=None)


def body(document: Mapping[str, Any]) -> str:
    """Contenders by size, their stages, throttled steps, and foretold beside measured."""
    rows = rows_of(document)
    runs = {key: row for key, row in rows.items() if row.get("contender")}
    parts = []
    for size in sorted({row.get("size") for row in runs.values() if row.get("size")}):
        of_size = {key: row for key, row in runs.items() if row.get("size") == size}
        parts += [f"### {size} px\n", _contenders(of_size), _stages(of_size)]
    others = {key: row for key, row in rows.items() if key not in runs}
    parts += ["### Other rows\n", _plain(others)] if others else []
    foretold = list(_foretold(runs))
    titles = ("row", "stage", "foretold", "measured", "difference")
    parts += ["### Foretold and measured, allocated\n", table(titles, foretold)] if foretold else []
    return "\n".join(parts)


def _contenders(rows: Mapping[str, Row]) -> str:
    return table(
        ("row", "contender", "cap", "allocated", "reserved", "process", "RAM", "read",
         "first picture", "further picture"),
        (_contender(key, row) for key, row in rows.items()),
    )  # fmt: skip


def _contender(key: str, row: Row) -> Iterator[str]:
    yield from (f"`{key}`", str(row["contender"]), gigabytes(row.get("limit_bytes")))
    if not row.get("ok"):
        yield from (str(row.get("error")), *[NONE] * 6)
        return
    yield from (gigabytes(peak(row, name)) for name in _PEAKS)
    yield gigabytes(whole(row).get("read_bytes"))
    yield seconds(row.get("seconds_to_first_picture"))
    yield seconds(row.get("seconds_per_further_picture"))


def _stages(rows: Mapping[str, Row]) -> str:
    """Allocated peak and seconds of each stage."""
    names = ("encode", "denoise", "decode")
    lines = []
    for key, row in rows.items():
        stages = {each["name"]: each for each in row.get("stages") or []}
        if any(name in stages for name in names):
            lines.append(
                [f"`{key}`"]
                + [gigabytes(stages.get(n, {}).get("peak_allocated_bytes")) for n in names]
                + [seconds(stages.get(n, {}).get("seconds")) for n in names]
            )
    titles = ("row", *(f"{name}, allocated" for name in names), *(f"{n}, seconds" for n in names))
    return table(titles, lines) if lines else ""


def _plain(rows: Mapping[str, Row]) -> str:
    """Rows of no contender, as they are: each number with its name."""
    return table(("row", "figures"), ((f"`{key}`", _figures(row)) for key, row in rows.items()))


def _figures(row: Row) -> str:
    said = []
    for name, value in row.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            shown = gigabytes(value) if name.endswith("bytes") else f"{value:.3g}"
            said.append(f"{name.replace('_', ' ')} {shown}")
    return str(row["error"]) if row.get("error") else ", ".join(said) or NONE


def _foretold(rows: Mapping[str, Row]) -> Iterator[tuple[str, ...]]:
    for key, row in rows.items():
        for stage in row.get("stages") or []:
            foretold = (stage.get("predicted") or {}).get("peak_allocated_bytes")
            measured = stage.get("peak_allocated_bytes")
            if foretold and measured:
                difference = share(measured / foretold - 1)
                told = (gigabytes(foretold), gigabytes(measured), difference)
                yield (f"`{key}`", str(stage["name"]), *told)


def find(rows: Mapping[str, Row], contender: str, **fields: Any) -> list[Row]:
    """Rows of a contender that went well and have these fields."""
    return [
        row
        for row in rows.values()
        if row.get("contender") == contender
        and row.get("ok")
        and all(row.get(name) == value for name, value in fields.items())
    ]


def least_peak(rows: list[Row], name: str) -> int | None:
    """The smallest peak among rows that may differ in their budget."""
    return min((found for row in rows if (found := peak(row, name))), default=None)


def throughput(rows: Mapping[str, Row], contender: str) -> float | None:
    """Pictures a second of 100 prompts at 8 GiB, loading included."""
    for row in find(rows, contender, size=1024, pictures=100):
        taken = whole(row).get("seconds")
        limits = (row.get("limit_bytes"), row.get("budget_bytes"))
        if taken and 8 * _GIB in limits:
            return 100 / float(taken)
    return None
