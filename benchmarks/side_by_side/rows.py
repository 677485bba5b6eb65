"""Rows of results: what each is of, and the file that they are kept in.

A row is found again by its key, so that parts run in any order and a row that is measured anew
replaces the old one: figures and an out-of-memory are results, and only a result replaces one. Rows
of several machines stand in one file; each says which.

Notes are for readers, written into the file by hand: a text, or an object with "text", "about" (how
the keys begin that it is about) and "written" ("2026-11-27 04:10 UTC"). Such a note stands until
there are results of that beginning and all of them were measured after it was written.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

GIB = 1 << 30
Note = str | Mapping[str, str]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """One row that is to be measured.

    Attributes:
        part: of the benchmark.
        contender: as `benchmarks.baselines` names it; or what else is measured.
        size: side of the pictures, px; 0 where none is made.
        cache: "cold" (the checkpoint's files out of the page cache), "warm" or "".
        limit: bytes of the process on the card, enforced; None for no cap.
        budget: bytes, of lowvram's `--vram`; None for none.
        stage_budget: bytes, of its `--stage-budget`, likewise.
        timed: whether the row is run alone, so that its seconds mean something.
        also: what else tells it from others, words without "/".
    """

    part: str
    contender: str
    size: int
    prompts: int = 1
    steps: int = 20
    cache: str = ""
    limit: int | None = None
    budget: int | None = None
    stage_budget: int | None = None
    timed: bool = True
    also: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Its name in the file: "first/lowvram budget 1 GiB/1024 px/1 picture/20 steps/warm"."""
        named = {"budget": self.budget, "stage-budget": self.stage_budget, "limit": self.limit}
        bounds = [f"{name} {readable(n)}" for name, n in named.items() if n is not None]
        parts = [self.part, " ".join([self.contender, *bounds])]
        if self.size:
            parts += [f"{self.size} px", f"{self.prompts} picture" + "s" * (self.prompts > 1)]
            parts += [f"{self.steps} steps"] if self.steps else ["decode only"]
        return "/".join([*parts, *([self.cache] if self.cache else []), *self.also])


@dataclass
class Store:
    """The result file, written anew after each row.

    Attributes:
        path: of the file.
        machine: what the figures of this run depend on.
    """

    path: Path
    machine: Mapping[str, Any]
    rows: dict[str, dict[str, Any]] = field(init=False)
    machines: dict[str, Any] = field(init=False)
    notes: list[Note] = field(init=False)

    def __post_init__(self) -> None:
        before = {}
        if self.path.is_file():
            before = json.loads(self.path.read_text(encoding="utf-8"))
        self.rows = dict(before.get("rows", {}))
        self.machines = dict(before.get("machines", {}))
        self.notes = list(before.get("notes", ()))  # what a reader has to know of the rows
        self._lock = threading.Lock()
        self._mine = machine_key(self.machine)

    def add(self, key: str, row: Row) -> bool:
        """Keep a row in place of the one with the same key; False where that one stays."""
        new = {**row, "machine": self._mine, "measured": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
        with self._lock:
            if key in self.rows and _counting(self.rows[key], new) is not new:
                return False
            self.machines[self._mine] = dict(self.machine)
            self.rows[key] = new
            self._write()
        return True

    def document(self) -> dict[str, Any]:
        """All of it, as the file has it."""
        return _document(self.notes, self.machines, self.rows)

    def _write(self) -> None:
        """In one step: a run that is stopped leaves the last whole file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".json.part")
        beside.write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.path)


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two result files as one: of rows with one key the later result, the second's if alike."""
    rows = dict(first["rows"])
    for key, row in second["rows"].items():
        both = sorted([rows.get(key, row), row], key=lambda each: str(each["measured"]))
        rows[key] = _counting(*both)
    machines = {**first["machines"], **second["machines"]}
    notes = list(first.get("notes", ()))
    notes += [note for note in second.get("notes", ()) if note not in notes]
    return _document(notes, machines, rows)


def is_result(row: Row) -> bool:
    """Whether it says something of the contender: figures, or that it runs out of memory."""
    return bool(row.get("ok")) or str(row.get("error")).startswith("out of memory")


def _counting(earlier: Row, later: Row) -> Row:
    """Which of two rows with one key counts."""
    return later if is_result(later) or not is_result(earlier) else earlier


def _document(
    notes: Sequence[Note], machines: Mapping[str, Any], rows: Mapping[str, Row]
) -> dict[str, Any]:
    standing = [note for note in notes if _stands(note, rows)]
    found = {"notes": standing} if standing else {}
    return {"benchmark": "gpu", **found, "machines": machines, "rows": rows}


def _stands(note: Note, rows: Mapping[str, Row]) -> bool:
    """Whether a note still says something of the rows."""
    if isinstance(note, str):
        return True
    results = [row for key, row in rows.items() if key.startswith(note["about"]) and is_result(row)]
    return not results or any(row["measured"] <= note["written"] for row in results)


def machine_key(machine: Mapping[str, Any]) -> str:
    """A short name for what figures depend on: the same facts, the same name."""
    text = json.dumps(machine, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def readable(amount: int) -> str:
    """Bytes as they are asked for: "8 GiB", "1.5 GiB", "256 MiB"; "0.27 GB" of whole 10 MB."""
    if amount % 10_000_000 == 0:
        return f"{amount / 1e9:g} GB"
    return f"{amount / GIB:g} GiB" if amount >= GIB else f"{amount / (1 << 20):g} MiB"
