"""Prepared components: what they were made from, and finding them again.

A prepared component is a folder in the library's own layout (`prepared_folders.py`) with a
manifest, `lowvram.json`; with the manifest it is finished, without it nothing. What is left behind
unfinished is started anew, not continued: a component takes minutes, and finished components stay.
`stages/prepare.py` makes them. Imports no torch.
"""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lowvram import artifacts
from lowvram.errors import RequestError, StorageError
from lowvram.files import absolute
from lowvram.manifest import MANIFEST, Prepared, is_whole, read_manifest
from lowvram.prepared_folders import (
    ELSEWHERE,
    PART,
    cache_folder,
    check_ours,
    delete,
    elsewhere,
    forget,
    is_ours,
    locked,
    part_of,
    place,
    storage_errors,
)
from lowvram.repository import Model
from lowvram.sharing import same_content, same_files

WEIGHTS = ("bf16", "8bit", "4bit")  # as on the command line


@dataclass(frozen=True)
class Entry:
    """A line of the list.

    Attributes:
        name: for people and for `remove`: "pixart-sigma-1024/text_encoder-8bit".
        path: of its folder.
        state: "ready", "damaged" (files are missing or cut), "unfinished" (left behind by a
            prepare that was killed) or "missing" (its disk is not there, or it was deleted).
        bytes: that it takes.
        prepared: the manifest; None where there is none.
    """

    name: str
    path: Path
    state: str
    bytes: int
    prepared: Prepared | None

    def to_json(self) -> dict[str, Any]:
        """JSON types: name, path, state, bytes, and the manifest without its files."""
        manifest = asdict(self.prepared) if self.prepared is not None else {}
        manifest.pop("files", None)
        return {**asdict(self), "path": str(self.path), "prepared": manifest or None}


def describe(model: Model, role: str, weights: str, dtype: str) -> Prepared:
    """The manifest of what is wanted, without its files."""
    class_name = model.get_family().component(role).class_name
    return Prepared(model.name, role, class_name, model.sources[role], weights, dtype, {}, {})


def fetch(model: Model, role: str, weights: str, dtype: str) -> tuple[Path, str]:
    """The folder to load a component from: prepared, or the model's own, downloaded if need be.

    Args:
        weights, dtype: as for `find`.

    Returns:
        the folder, and what to say of it: "prepared (text_encoder-8bit)", or "".

    Raises:
        ModelError: as `Model.fetch`.
    """
    folder = find(model, role, weights, dtype)
    return (model.fetch(role), "") if folder is None else (folder, f"prepared ({folder.name})")


def find(model: Model, role: str, weights: str, dtype: str) -> Path | None:
    """The folder of a prepared component that is there whole; None where there is none.

    Compares the source, weights and dtype, and the size of each file; where it finds none, the
    content of the source with what else was prepared in that way.

    Args:
        weights: "whole", "8bit" or "4bit"; "" for the tokenizer.
        dtype: "bfloat16", …; "" for the tokenizer.
    """
    wanted = describe(model, role, weights, dtype)
    if folder := placed(wanted):
        return folder
    return next(
        (folder for folder, made in _ready(wanted) if same_content(model, wanted.role, made)), None
    )


def placed(wanted: Prepared) -> Path | None:
    """The folder of a component that is whole at its own place; None where there is none."""
    for folder in (place(wanted), elsewhere(place(wanted))):
        if folder is not None and read(folder, wanted) is not None:
            return folder
    return None


def adopted(made: Prepared, target: Path) -> tuple[Path, Prepared] | None:
    """What was prepared before with the same files as `made`, from a source that is cut otherwise:
    it serves both from now on. None where there is no such, or another process works on it.
    """
    for folder in [folder for folder, _ in _ready(made) if folder != target]:
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(folder, wait=False))
            except StorageError:  # waiting could be in vain: it may want what is held here
                continue
            other = read_manifest(folder)  # as it is now that nobody else can change it
            if other is None or not other.is_like(made) or not is_whole(folder, other):
                continue
            if same_files(folder, other, target, made):
                both = replace(other, contents={**other.contents, **made.contents})
                artifacts.write_bytes(folder / MANIFEST, both.to_text().encode())
                return folder, both
    return None


def _ready(wanted: Prepared) -> Iterator[tuple[Path, Prepared]]:
    """Every component that was prepared as `wanted` would be, of whatever source."""
    for entry in list_prepared():
        made = entry.prepared
        if entry.state == "ready" and made is not None and made.is_like(wanted):
            yield entry.path, made


def read(folder: Path, wanted: Prepared) -> Prepared | None:
    """The manifest of a folder that is there whole and is what is wanted, else None."""
    found = read_manifest(folder)
    if found is None or not found.is_like(wanted) or found.source != wanted.source:
        return None
    return found if is_whole(folder, found) else None


def is_intact(folder: Path, made: Prepared) -> bool:
    """Whether every file still has the bytes that were verified: reads them all."""
    for name, facts in made.files.items():
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                return False
    return True


def list_prepared() -> list[Entry]:
    """Everything that was prepared here, what is unfinished or missing too."""
    entries = []
    for path in sorted(cache_folder().glob("*/*")):
        if path.is_dir():
            entries.append(_entry(path))
        elif path.suffix == ELSEWHERE and (folder := elsewhere(path.with_suffix(""))):
            there = [each for each in (folder, part_of(folder)) if each.is_dir()]
            entries += [_entry(each) for each in there or [folder]]
    return entries


def remove(name: str | Path) -> int:
    """Delete prepared components: only folders that a manifest or mark shows to be ours.

    Args:
        name: of a model, for all of its components; a name from the list; or a folder.

    Returns:
        bytes freed.

    Raises:
        RequestError: nothing of that name was prepared.
        StorageError: it is just being prepared, or cannot be deleted.
    """
    names = {str(name), str(absolute(name))}
    entries = [
        entry
        for entry in list_prepared()
        if names & {entry.name, entry.name.rpartition("/")[0], str(entry.path)}
    ]
    if not entries and is_ours(Path(name).absolute()):
        entries = [
            _entry(Path(name).absolute())
        ]  # made elsewhere, and the cache does not know of it
    if not entries:
        raise RequestError(f"nothing prepared is called {name}: see lowvram prepare --list")
    freed = 0
    for entry in entries:
        target = entry.path.with_name(entry.path.name.removesuffix(PART))
        with locked(target, wait=False), storage_errors(entry.path):
            if entry.path.is_dir():
                check_ours(entry.path)
                delete(entry.path)
                freed += entry.bytes
            forget(target)
    return freed


def _entry(path: Path) -> Entry:
    made = read_manifest(path)
    if made is not None and not path.name.endswith(PART):
        state = "ready" if is_whole(path, made) else "damaged"
    else:
        state = "unfinished" if path.is_dir() else "missing"
    files = [each for each in path.glob("*") if each.is_file()] if path.is_dir() else []
    model = made.model if made is not None else path.parent.name
    size = sum(file.stat().st_size for file in files)
    return Entry(f"{model}/{path.name}", path, state, size, made)
