"""Result rows as text for people, for the end of a run; goals are the page's."""

from collections.abc import Iterable, Mapping
from typing import Any

_PEAK = "peak_allocated_bytes"
_TITLES = ("row", "outcome", "1st picture", "further", "step", "allocated: encode", "denoise",
           "decode", "reserved", "process", "RAM (anonymous)", "read", "agrees")  # fmt: skip


def table(rows: Mapping[str, Mapping[str, Any]], parts: Iterable[str]) -> str:
    """The rows of some parts, aligned. GB and seconds are decimal; "–" is what is not known."""
    shown = [_cells(key, row) for key, row in rows.items() if key.partition("/")[0] in parts]
    widths = [max(map(len, column)) for column in zip(_TITLES, *shown, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index > 1 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in (_TITLES, *shown)
    )


def brief(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the last line says of each row: outcome, seconds, largest allocated and process peak."""
    return {
        key: [
            "ok" if row["ok"] else row["error"],
            _rounded(seconds_of(row)),
            peak(row, _PEAK),
            peak(row, "peak_process_bytes"),
        ]
        for key, row in rows.items()
    }


def seconds_of(row: Mapping[str, Any]) -> float | None:
    """To the first picture; of rows that make none a step's, or all of it. None if not timed."""
    if row.get("timed") is False:
        return None
    names = ("seconds_to_first_picture", "seconds_per_step", "seconds", "wall_seconds")
    return next((row[name] for name in names if row.get(name) is not None), None)


def peak(row: Mapping[str, Any], name: str, stage: str | None = None) -> int | None:
    """The largest of a peak over a row's stages, or that of one stage; None where not known."""
    stages = [each for each in row.get("stages") or [] if stage in (None, each["name"])]
    known = [each.get(name) for each in (stages if stages or stage else [row])]
    return max((value for value in known if value is not None), default=None)


def _cells(key: str, row: Mapping[str, Any]) -> list[str]:
    outcome = "ok" if row["ok"] else str(row["error"])
    agrees = {True: "yes", False: "NO", None: "–"}[row.get("agrees")]
    return [
        key,
        outcome if len(outcome) <= 60 else outcome[:59] + "…",
        _seconds(row.get("seconds_to_first_picture")),
        _seconds(row.get("seconds_per_further_picture")),
        _seconds(row.get("seconds_per_step") or row.get("seconds")),
        *(_gigabytes(peak(row, _PEAK, stage)) for stage in ("encode", "denoise", "decode")),
        _gigabytes(peak(row, "peak_reserved_bytes")),
        _gigabytes(peak(row, "peak_process_bytes")),
        _gigabytes(peak(row, "peak_anonymous_bytes")),
        _gigabytes(peak(row, "read_bytes") or peak(row, "disk_read_bytes")),
        agrees,
    ]


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _gigabytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e9:.2f} GB"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
