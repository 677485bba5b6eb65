"""Where prepared components lie, and what may be done to a folder there.

    CACHE/prepared/MODEL-HASH/text_encoder-8bit/

is one, with a manifest, `lowvram.json`, when it is finished. HASH stands for the source; or it lies
at the same place under a folder that the user named, and then a pointer,
text_encoder-8bit.elsewhere, lies in the cache. CACHE is the environment variable LOWVRAM_CACHE, or
the user's cache folder. What is being made is called ….part. Imports no torch.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowvram import artifacts
from lowvram.errors import NO_SPACE, StorageError
from lowvram.files import user_cache
from lowvram.manifest import MANIFEST, Prepared, read_manifest

log = logging.getLogger(__name__)

PART = ".part"  # how the name of a folder ends while it is being made
MARK = "lowvram.part"  # a file in it: that it is ours
ELSEWHERE = ".elsewhere"  # how the name of a pointer ends


def cache_folder() -> Path:
    """Where prepared components lie unless the user names another folder."""
    return user_cache() / "prepared"


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
    other = elsewhere(own)
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
    if elsewhere(own) == target:
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
    if not is_ours(folder):
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


def is_ours(folder: Path) -> bool:
    """Whether a folder, and not a link to one, has our manifest or mark."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    if folder.name.endswith(PART) and not any(folder.iterdir()):
        return True  # killed between making it and marking it, or just before it was gone
    return read_manifest(folder) is not None or (folder / MARK).is_file()


def elsewhere(wanted_place: Path) -> Path | None:
    """Where a component lies that was put elsewhere than at its place in the cache."""
    try:
        text = _pointer(wanted_place).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return Path(text) if text else None


def _pointer(wanted_place: Path) -> Path:
    return wanted_place.with_name(wanted_place.name + ELSEWHERE)
