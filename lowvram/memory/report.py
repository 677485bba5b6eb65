"""Shows what the stages took: a table for people, JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowvram.errors import ArtifactError

_COLUMNS = (
    ("stage", "stage"),
    ("weights", "weights"),
    ("dtype", "dtype"),
    ("load", "load_seconds"),
    ("compute", "compute_seconds"),
    ("allocated", "peak_allocated_bytes"),
    ("reserved", "peak_reserved_bytes"),
    ("process", "peak_process_bytes"),
    ("RAM (RSS)", "peak_rss_bytes"),
    ("left", "left_allocated_bytes"),
)


def read(path: Path) -> dict[str, Any]:
    """A report that `run` wrote: {"images": […], "stages": […]}.

    Raises:
        ArtifactError: no such file, or not a report.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        table(document["stages"])
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ArtifactError(f"{path} is not a report: lowvram run writes x.report.json") from None
    return dict(document)


def table(stages: Sequence[Mapping[str, Any]]) -> str:
    """The stages' reports as an aligned table; columns that no stage knows are left out.

    Args:
        stages: `StageReport.to_json()` of each stage, in order. Peaks are in GB (10^9 bytes).
    """
    shown = [
        (title, name)
        for title, name in _COLUMNS
        if any(stage.get(name) is not None for stage in stages)
    ]
    rows = [[title for title, _ in shown]]
    rows += [[_cell(name, stage.get(name)) for _, name in shown] for stage in stages]
    widths = [max(len(row[i]) for row in rows) for i in range(len(shown))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    left = [
        f"{stage['stage']} left behind: {', '.join(stage['left_behind'][:5])}"
        for stage in stages
        if stage.get("left_behind")
    ]
    return "\n".join(lines + left)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("_seconds"):
        return f"{value:.1f} s"
    if name.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB" if abs(value) >= 5e6 else f"{value / 1e6:.2f} MB"
    return str(value)
