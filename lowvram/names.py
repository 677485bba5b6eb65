"""Names for what the user leaves unnamed: no earlier run has used them, and none at the same time.

The second picture called "a-cat" is "a-cat_2", so that no name is that of one of several pictures
of another prompt, which end in "-0", "-1" and so on. A name is taken by an empty file beside what
will bear it, `.NAME.taken`, which the system makes for one run only and which is gone when the run
ends; of a run that is killed it stays, and later ones go on to the next number. Imports no torch.
"""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lowvram.errors import StorageError

DEFAULT_FOLDER = Path("outputs")


@contextmanager
def new_path(prompts: Sequence[str], suffix: str, folder: Path = DEFAULT_FOLDER) -> Iterator[Path]:
    """A path in the folder, named after the first prompt, that is this run's alone.

    Raises:
        StorageError: the folder cannot be made or written.
    """
    words = words_of(prompts[0] if prompts else "")
    with _made(folder):
        used = _stems(folder)
        for number in itertools.count(1):
            name = words if number == 1 else f"{words}_{number}"
            if name in used:
                continue
            with _taken(folder, name) as own:
                # Looked at once it is taken: what is not there now, nobody else will put there.
                if own and name not in _stems(folder):
                    yield folder / f"{name}{suffix}"
                    return


@contextmanager
def new_folder(name: str, parent: Path = DEFAULT_FOLDER) -> Iterator[Path]:
    """A folder that was not there before; it is removed again if nothing is put into it.

    Raises:
        StorageError: it cannot be made.
    """
    slug = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "batch"
    for number in itertools.count(1):
        folder = parent / (slug if number == 1 else f"{slug}-{number}")
        with _made(parent):
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise _unwritable(folder, error) from None
            try:
                yield folder
            finally:
                with suppress(OSError):  # what was put into it
                    folder.rmdir()
            return


def words_of(prompt: str) -> str:
    """The first words of a prompt as a part of a file's name, which ends in no picture's number."""
    words = re.findall(r"\w+", prompt.lower())
    name = "-".join(words)[:60].encode()[:120].decode(errors="ignore")  # a name may have 255 bytes
    return re.sub(r"-(\d+)$", r"_\1", name.rstrip("-")) or "picture"


def _stems(folder: Path) -> set[str]:
    """What names in a folder are made of: numbered pictures and a refiner's leftovers, too."""
    try:
        stems = {each.split(".", 1)[0] for each in os.listdir(folder)}
    except OSError as error:
        raise _unwritable(folder, error) from None
    return stems | {re.sub(r"-(unrefined.*|\d+)$", "", stem) for stem in stems}


@contextmanager
def _taken(folder: Path, name: str) -> Iterator[bool]:
    """Whether the name is this run's now; others find it taken as long as this lasts."""
    path = folder / f".{name}.taken"
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            yield False
            return
        except FileNotFoundError:  # another run has failed, and taken its empty folder away
            _make(folder)
        except OSError as error:
            raise _unwritable(folder, error) from None
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder, which is gone afterwards if it was not there before and nothing is in it."""
    missing = [each for each in (folder, *folder.parents) if not os.path.exists(each)]
    _make(folder)
    try:
        yield
    finally:
        for each in missing:
            with suppress(OSError):  # not empty
                each.rmdir()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{folder} cannot be written to ({error.strerror}): choose another place with -o"
    )
