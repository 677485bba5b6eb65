"""What was found on a machine: rows, as a text to paste into a report and as JSON.

Nothing in it names the user: the home folder is ~.
"""

import getpass
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1

_MARKS = {"ok": " ", "unknown": " ", "note": "!"}  # all else is X


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        group, name: what; together they are unique.
        text: for people.
        value: for programs, JSON types only: bytes, bytes a second, …; None where it is not known.
        state: "ok", "unknown" (this machine does not say, or it was not asked), "note" (worth
            reading), "below" (an older version than is needed), "missing", or "failed".
        needed: lowvram does not work as it should without it.
    """

    group: str
    name: str
    text: str
    value: Any = None
    state: str = "ok"
    needed: bool = False

    @property
    def is_broken(self) -> bool:
        """Whether it is needed and not there."""
        return self.needed and self.state in ("below", "missing", "failed")


@dataclass(frozen=True)
class Diagnosis:
    """All rows, in order."""

    rows: tuple[Row, ...]

    @property
    def broken(self) -> list[str]:
        """Names of what is needed and does not work."""
        return [row.name for row in self.rows if row.is_broken]

    def to_json(self) -> dict[str, Any]:
        """{"version", "ok", "checks": {group: {name: {"state", "text", "value"}}}}."""
        checks: dict[str, dict[str, Any]] = {}
        for row in self.rows:
            entry = {"state": row.state, "text": row.text, "value": row.value}
            checks.setdefault(row.group, {})[row.name] = entry
        return {"version": FORMAT_VERSION, "ok": not self.broken, "checks": checks}

    def to_text(self) -> str:
        """Aligned lines: ! marks what is worth reading, X what is too old, missing or failed."""
        width = max(len(row.name) for row in self.rows)
        lines, group = [], ""
        for row in self.rows:
            if row.group != group:
                lines += ["", row.group]
                group = row.group
            mark = _MARKS.get(row.state, "X")
            lines.append(f"{mark} {row.name.ljust(width)}  {row.text}".rstrip())
        broken = ", ".join(self.broken)
        lines += ["", f"needed and not working: {broken}" if broken else "all that is needed works"]
        return "\n".join(lines[1:])


def private(text: str) -> str:
    """The text with ~ for the home folder, and USER for folders that bear the user's name."""
    flags = re.IGNORECASE if os.name == "nt" else 0
    home = Path.home()
    for folder in {home, home.resolve()}:
        if len(folder.parts) > 1:  # some containers have / for a home
            text = re.sub(rf"(?<![\w.-]){re.escape(str(folder))}(?![\w.-])", "~", text, flags=flags)
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # an id without a name
        return text
    if user != "root":
        text = re.sub(rf"(?<=[/\\]){re.escape(user)}(?=[/\\]|$)", "USER", text, flags=flags)
    return text


def private_row(row: Row) -> Row:
    """A row without the user's name and home."""
    value = row.value
    if isinstance(value, dict):
        value = {k: private(v) if isinstance(v, str) else v for k, v in value.items()}
    elif isinstance(value, str):
        value = private(value)
    return replace(row, text=private(row.text), value=value)
