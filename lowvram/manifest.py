"""The manifest of a prepared component: with it a folder is finished, without it nothing."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowvram import artifacts
from lowvram.files import Source

FORMAT_VERSION = 1
MANIFEST = "lowvram.json"


@dataclass(frozen=True)
class Prepared:
    """The manifest of a prepared component.

    Attributes:
        model: its name, as the user gave it.
        role, class_name: of the component.
        source: what it was made from.
        weights: "whole", "8bit" or "4bit"; "" for the tokenizer.
        dtype: of all that is not quantised, e.g. "bfloat16"; "" for the tokenizer.
        versions: of the packages that made it.
        files: name to {"bytes", "sha256"}.
        made: when, in UTC (ISO 8601).
        version: of the format.
        contents: keys of the sources it serves (see contents.py), each with the bytes of its
            weights.
    """

    model: str
    role: str
    class_name: str
    source: Source
    weights: str
    dtype: str
    versions: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]
    made: str = ""
    version: int = FORMAT_VERSION
    contents: Mapping[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(int(file["bytes"]) for file in self.files.values())

    def is_like(self, wanted: "Prepared") -> bool:
        """Whether it is in the form of `wanted`, of whatever source. Versions may differ: the files
        are the libraries' own format, which newer versions read.
        """
        names = ("role", "class_name", "weights", "dtype", "version")
        return all(getattr(self, name) == getattr(wanted, name) for name in names)

    def to_text(self) -> str:
        """The manifest's file."""
        return artifacts.canonical_json(asdict(self))


def read_manifest(folder: Path) -> Prepared | None:
    """Of a folder; None where there is none that makes sense."""
    try:
        value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        made = Prepared(**{**value, "source": Source(**value["source"])})
        sizes = [int(file["bytes"]) for file in made.files.values()]
        sizes += [int(size) for size in made.contents.values()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return made if sizes and made.files and made.version <= FORMAT_VERSION else None


def is_whole(folder: Path, made: Prepared) -> bool:
    """Whether every file is there in its length."""
    try:
        return all((folder / n).stat().st_size == f["bytes"] for n, f in made.files.items())
    except OSError:
        return False
