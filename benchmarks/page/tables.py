"""Tables, numbers and what a result was measured on, as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.machine import COMMIT, OWN

NONE = "–"
NOT_RECORDED = "not recorded"
_LIBRARIES = ("python", "torch", "transformers", "diffusers", "accelerate", "bitsandbytes")


def table(titles: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; bars within a cell are escaped."""
    lines = [list(titles), ["---"] * len(titles), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines) + "\n"


def folded(title: str, text: str) -> str:
    """Text that opens on a click."""
    return f"<details><summary>{title}</summary>\n\n{text}\n</details>\n"


def gigabytes(amount: float | None) -> str:
    """GB (10^9 bytes) with two decimals, MB below 0.1 GB."""
    if amount is None:
        return NONE
    return f"{amount / 1e9:.2f} GB" if abs(amount) >= 1e8 else f"{amount / 1e6:.2f} MB"


def rate(amount: float | None) -> str:
    """GB a second."""
    return NONE if amount is None else f"{amount / 1e9:.2f} GB/s"


def seconds(amount: float | None) -> str:
    """Seconds, with two decimals below ten."""
    if amount is None:
        return NONE
    return f"{amount:.2f} s" if abs(amount) < 10 else f"{amount:.0f} s"


def share(amount: float | None) -> str:
    """Per cent with two decimals, signed."""
    return NONE if amount is None else f"{amount:+.2%}"


def measured_on(document: Mapping[str, Any]) -> str:
    """Machine, versions and date of a result, in one paragraph; what is missing is said.

    Results before `benchmarks.machine.recorded` have libraries within "machine", or no machine.
    """
    found = document.get("machine")
    facts: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    known = document.get("versions") or facts
    versions = [f"{name} {known[name]}" for name in _LIBRARIES if known.get(name)]
    own = [known.get(name) for name in (OWN, COMMIT)]
    versions += [" ".join([OWN, *filter(None, own)])] if any(own) else []
    if not versions and document.get("torch"):
        versions = [f"torch {document['torch']}"]
    load = document.get("load_average_before")
    said = [
        f"Machine: {_machine(found)}",
        f"versions: {', '.join(versions) or NOT_RECORDED}",
        f"date: {document.get('date') or NOT_RECORDED}",
    ]
    said += [f"load average before: {load:.1f}"] if load is not None else []
    return "; ".join(said) + ".\n"


def measured_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """The same for rows that were recorded one by one: a line for each different machine."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        about = row.get("recorded") or {}
        fixed = {name: about.get(name) for name in ("machine", "versions")}
        groups.setdefault(measured_on({**fixed, "date": "@"}), []).append(about)
    lines = []
    for said, members in groups.items():
        dates = sorted({str(each.get("date")) for each in members})
        loads = [each["load_average_before"] for each in members if each.get("load_average_before")]
        when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        busy = f"; load average before a row: {min(loads):.1f} to {max(loads):.1f}" if loads else ""
        lines.append(said.replace("date: @", f"date: {when}{busy} ({len(members)} rows)"))
    return "\n".join(lines)


def noted(document: Mapping[str, Any]) -> str:
    """What a reader has to know of the figures, a point each; empty where nothing is noted."""
    notes = document.get("notes") or ()
    return "".join(f"- {each if isinstance(each, str) else each['text']}\n" for each in notes)


def _machine(found: Any) -> str:
    if isinstance(found, str):
        return found
    if not found:
        return NOT_RECORDED
    parts = [str(found.get("cpu", ""))]
    parts += [f"{found['cores']} cores"] if found.get("cores") else []
    memory = found.get("memory_bytes")
    parts += [f"{memory / 1e9:.0f} GB memory"] if memory else []
    if found.get("gpu"):
        parts.append(f"{found['gpu']} with {found['gpu_memory_bytes'] / 1e9:.0f} GB")
    return ", ".join(part for part in parts if part) or NOT_RECORDED


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
