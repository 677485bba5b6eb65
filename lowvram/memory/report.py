"""Shows what the stages took, as a table for people: predicted beside measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from lowvram.memory.plan import show

_TEXTS = (("stage", "stage"), ("weights", "weights"), ("dtype", "dtype"))
_MEASURED = (
    ("load", "load_seconds"),
    ("compute", "compute_seconds"),
    ("total", "seconds"),
    ("allocated", "peak_allocated_bytes"),
    ("reserved", "peak_reserved_bytes"),
    ("process", "peak_process_bytes"),
    ("RAM (RSS)", "peak_rss_bytes"),
    ("read", "disk_read_bytes"),
    ("left", "left_allocated_bytes"),
)
_BUDGETED = "peak_allocated_bytes"
# Numbers that say nothing new unless they were foretold: load and compute are shown.
_IF_PREDICTED = {"seconds"}


def table(stages: Sequence[Mapping[str, Any]]) -> str:
    """The stages' reports as an aligned table; columns that no stage knows are left out.

    Args:
        stages: `StageReport.to_json()` of each stage, in order. Sizes are decimal.
    """
    rows = cells(stages)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < len(_TEXTS) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines + [note for stage in stages for note in notes(stage)])


def cells(stages: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table's rows, titles first. What was predicted follows what was measured."""
    columns = [[title, *(_text(stage.get(name)) for stage in stages)] for title, name in _TEXTS]
    for title, name in _MEASURED:
        measured = [stage.get(name) for stage in stages]
        foretold = [(stage.get("predicted") or {}).get(name) for stage in stages]
        shown = _known(measured) and (name not in _IF_PREDICTED or _known(foretold))
        if shown:
            columns.append([title, *(readable(name, value) for value in measured)])
        if _known(foretold):
            said = "(predicted)" if shown else f"{title} (predicted)"
            columns.append([said, *(readable(name, value) for value in foretold)])
        budgets = [stage.get("budget_bytes") for stage in stages]
        if name == _BUDGETED and _known(budgets):
            columns.append(["budget", *(readable("budget_bytes", value) for value in budgets)])
    return [list(row) for row in zip(*columns, strict=True)]


def notes(stage: Mapping[str, Any]) -> list[str]:
    """What did not go as it should, and what a stage left behind, a line each."""
    return [f"{stage['stage']}: {note}" for note in stage.get("notes") or []] + left_notes(stage)


def left_notes(stage: Mapping[str, Any]) -> list[str]:
    """What a stage left behind, in a line; none where it left nothing."""
    tensors = stage.get("left_tensors") or []
    names = [left_tensor(each) for each in tensors] or stage.get("left_behind") or []
    count = max(len(names), len(stage.get("left_behind") or []))
    if not names:
        return []
    more = f" and {count - 5} more" if count > 5 else ""
    return [f"{stage['stage']} left behind: {', '.join(names[:5])}{more}"]


def left_tensor(tensor: Mapping[str, Any]) -> str:
    """A tensor that stayed: its name, shape, size and what holds it."""
    shape = " × ".join(map(str, tensor["shape"])) or "scalar"
    owner, holder = tensor.get("owner") or "not known", tensor.get("held_by")
    held = f", held by {holder}" if holder and holder != owner else ""
    size = readable("_bytes", tensor.get("bytes"))
    return f"{owner} ({shape} {tensor.get('dtype')}, {size}{held})"


def readable(name: str, value: float | None) -> str:
    """A number with its unit, which its name tells; "-" where it is not known."""
    if value is None:
        return "-"
    if name.endswith("seconds"):
        return f"{value:.1f} s"
    if abs(value) >= 5e6:
        return show(value)
    return f"{value / 1e3:.2f} kB" if 0 < abs(value) < 5e3 else f"{value / 1e6:.2f} MB"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _known(values: Sequence[Any]) -> bool:
    return any(value is not None for value in values)
