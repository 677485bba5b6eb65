"""Prepared components: where they lie, what they were made from, and finding them again.

A prepared component is a folder in the library's own layout with a manifest, `lowvram.json`; with
the manifest it is finished, without it nothing. It lies under

    CACHE/prepared/MODEL-HASH/text_encoder-8bit/

where HASH stands for the source, or at the same place under a folder that the user named, and
then a pointer, text_encoder-8bit.elsewhere, lies in the cache. CACHE is the environment variable
LOWVRAM_CACHE, or the user's cache folder. What is being made is called ….part, and is started
anew, not continued, when it was left behind: a component takes minutes, and finished components
stay. `stages/prepare.py` makes them. Imports no torch.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lowvram import artifacts
from lowvram.errors import NO_SPACE, RequestError, StorageError
from lowvram.files import absolute, user_cache
from lowvram.manifest import MANIFEST, Prepared, is_whole, read_manifest
from lowvram.repository import Model
from lowvram.sharing import same_content, same_files

log = logging.getLogger(__name__)

WEIGHTS = ("bf16", "8bit", "4bit")  # as on the command line
PART = ".part"  # how the name of a folder ends while it is being made
MARK = "lowvram.part"  # a file in it: that it is ours

_ELSEWHERE = ".elsewhere"
_CHUNK_BYTES = 1 << 20


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


def cache_folder() -> Path:
    """Where prepared components lie unless the user names another folder."""
    return user_cache() / "prepared"


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
    for folder in (place(wanted), _elsewhere(place(wanted))):
        if folder is not None and read(folder, wanted) is not None:
            return folder
    return next(
        (folder for folder, made in _ready(wanted) if same_content(model, wanted.role, made)), None
    )


def adopted(made: Prepared, target: Path) -> tuple[Path, Prepared] | None:
    """What was prepared before with the same files as `made`, from a source that is cut otherwise:
    it serves both from now on. None where there is no such.
    """
    for folder, other in _ready(made):
        if folder != target and same_files(folder, other, target, made):
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
        elif path.suffix == _ELSEWHERE and (folder := _elsewhere(path.with_suffix(""))):
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
    if not entries and _is_ours(Path(name).absolute()):
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


def place(wanted: Prepared, root: Path | None = None) -> Path:
    """Where a component belongs, under the cache or another folder."""
    source = wanted.source
    # A folder that has changed is prepared anew in the same place; commits lie side by side.
    revision = source.revision if source.kind == "hub" else ""
    digest = hashlib.sha256(f"{source.kind}\0{source.place}\0{revision}".encode()).hexdigest()
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source.place).name).strip("-.")[:60]
    form = wanted.dtype if wanted.weights == "whole" else wanted.weights
    leaf = f"{wanted.role}-{form}" if form else wanted.role
    return (root or cache_folder()) / f"{slug}-{digest[:8]}" / leaf


def point(wanted: Prepared, target: Path) -> None:
    """Leave word in the cache of a component that lies elsewhere.

    Raises:
        StorageError: the cache cannot be written.
    """
    own = place(wanted)
    other = _elsewhere(own)
    if target != own and other != target:
        if other is not None and other.is_dir():
            log.warning("%s stays and is used no more: lowvram prepare --remove %s", other, other)
        artifacts.write_bytes(_pointer(own), str(target).encode())


def part_of(target: Path) -> Path:
    """The folder in which a component is made."""
    return target.with_name(target.name + PART)


@contextmanager
def locked(
    target: Path, wait: bool = True, on_wait: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold a component's place against other processes; the system frees it when one dies.

    Args:
        on_wait: called once if another process holds it.

    Raises:
        StorageError: another process holds it, and `wait` is False.
    """
    from filelock import FileLock, Timeout

    digest = hashlib.sha256(str(target.absolute()).encode()).hexdigest()
    path = cache_folder() / ".locks" / f"{digest[:16]}.lock"
    with storage_errors(path, "LOWVRAM_CACHE"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise StorageError(
                    f"{target} is being prepared by another process: wait for it, or end it"
                ) from None
            on_wait()
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def forget(target: Path) -> None:
    """Where nothing lies now, drop the cache's word of it and the folders that are empty."""
    if target.is_dir():
        return
    own = cache_folder() / target.parent.name / target.name
    if _elsewhere(own) == target:
        _pointer(own).unlink()
    for folder in {own.parent, target.parent}:
        if re.search(r"-[0-9a-f]{8}$", folder.name):  # as `place` names them
            with suppress(OSError):  # not empty, or not there
                folder.rmdir()


@contextmanager
def storage_errors(path: Path, option: str = "--to") -> Iterator[None]:
    """Turn what the system says of a full disk or a folder that cannot be written into one line.

    Args:
        option: with which another place is named.

    Raises:
        StorageError: names the file.
    """
    try:
        yield
    except OSError as error:
        space = "free some space, or " if error.errno in NO_SPACE else ""
        raise StorageError(
            f"prepare could not write {error.filename or path} ({error.strerror or error}): "
            f"{space}choose another disk with {option}"
        ) from None


def check_ours(folder: Path) -> None:
    """Refuse to touch what this package did not make.

    Raises:
        StorageError: names it.
    """
    if not _is_ours(folder):
        raise StorageError(
            f"{folder} is there and was not made by lowvram: move it away, or use another folder"
        )


def delete(folder: Path) -> None:
    """Delete a folder of ours. It stops being found first and being ours last."""
    part = folder if folder.name.endswith(PART) else part_of(folder)
    if part != folder:
        if part.exists():
            check_ours(part)
            delete(part)
        os.replace(folder, part)
    marks = [part / MANIFEST, part / MARK]
    for path in part.iterdir():
        if path not in marks:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in marks:
        path.unlink(missing_ok=True)
    part.rmdir()


def _is_ours(folder: Path) -> bool:
    """Whether a folder, and not a link to one, has our manifest or mark."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    if folder.name.endswith(PART) and not any(folder.iterdir()):
        return True  # killed between making it and marking it, or just before it was gone
    return read_manifest(folder) is not None or (folder / MARK).is_file()


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


def _pointer(wanted_place: Path) -> Path:
    return wanted_place.with_name(wanted_place.name + _ELSEWHERE)


def _elsewhere(wanted_place: Path) -> Path | None:
    """Where a component lies that was put elsewhere than at its place in the cache."""
    try:
        text = _pointer(wanted_place).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return Path(text) if text else None
