"""A plan as a table for people, and as a document for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowvram.stages.plan import Row

_COLUMNS = (
    ("allocated", "peak_allocated_bytes"),
    ("reserved", "peak_reserved_bytes"),
    ("process", "peak_process_bytes"),
    ("RAM", "peak_rss_bytes"),
    ("read", "disk_read_bytes"),
)


def as_table(rows: "Sequence[Row]", device: str) -> str:
    """One line a way, sizes in decimal GB, columns that no row knows left out; reasons below."""
    shown = [(t, n) for t, n in _COLUMNS if any(row.predicted[n] is not None for row in rows)]
    lines = [["", "stage", "way", "dtype", *(title for title, _ in shown), "time"]]
    for row in rows:
        mark = "*" if row.reason else " " if row.fits else "x"
        sizes = [_gb(row.predicted[name]) for _, name in shown]
        lines.append([mark, row.stage, row.way, row.dtype, *sizes, _time(row.predicted["seconds"])])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if i < 4 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    told = {row.stage for row in rows if row.reason}
    text += ["", f"for {device}; * chosen, x does not fit"]
    text += [f"{row.stage}: {row.reason}" for row in rows if row.reason]
    text += [
        f"{stage}: nothing fits"
        for stage in dict.fromkeys(row.stage for row in rows)
        if stage not in told
    ]
    return "\n".join(text)


def as_document(rows: "Sequence[Row]", device: str) -> dict[str, Any]:
    """Bytes and seconds; null where a device has no such counter."""
    return {
        "device": device,
        "stages": [{**asdict(row), "chosen": bool(row.reason)} for row in rows],
    }


def _gb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e9:.3f} GB"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
