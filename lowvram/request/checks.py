"""What every request is checked for, with errors that name the option."""

import os
from collections.abc import Sequence
from pathlib import Path

from lowvram.errors import RequestError, StorageError


def artifact(path: str | Path, *inputs: str | Path | None) -> str:
    """The path of a file that a stage will write, after a look that it can."""
    if Path(path).suffix != ".safetensors":
        raise RequestError(f"{path} does not end in .safetensors, which this stage writes")
    for each in inputs:
        if each is not None and Path(each).resolve() == Path(path).resolve():
            raise RequestError(f"{path} is the input: name another file with -o")
    check_writable(Path(path))
    return str(path)


def check_writable(path: Path) -> None:
    """Find out before minutes of work that a file cannot be written.

    Raises:
        StorageError: it is a folder, its folder cannot be made or written, or a name is too long.
    """
    folder = path.parent
    try:
        if path.is_dir():
            raise StorageError(f"{path} is a folder: name a file with -o")
        while not folder.exists():
            folder = folder.parent
        for part in path.relative_to(folder).parts:  # a system asked for the whole path may stop
            (folder / part).exists()  # at the first folder that is missing
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror}): name another with -o"
        ) from None
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise StorageError(f"{folder} cannot be written to: choose another place with -o")


def is_unicode(text: str) -> bool:
    """False for what a terminal in another encoding can leave in an argument."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_of(option: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise RequestError(f"{option} {value} is not known: use {', '.join(allowed)}")
    return value


def budget(option: str, size: int | None) -> int:
    """Bytes; 0 for none."""
    if size is not None and not 1 << 20 <= size < 1 << 50:
        raise RequestError(f"{option} {size} bytes is not 1 MiB to 1 PiB: write it as 0.5GiB")
    return size or 0


def in_range(option: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise RequestError(f"{option} {value} is out of range: {least} to {most}")
    return int(value)
