"""The rows of a list: what one may say, and the tasks that it and what is the same for all make.

A row says what it has of its own, a prompt at least. Imports no torch.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram.course import Trip
from lowvram.errors import LowvramError, RequestError
from lowvram.repository import Model
from lowvram.request.checks import is_unicode
from lowvram.request.decode import picture_paths
from lowvram.request.run import RunOptions, resolve_image, resolve_run
from lowvram.run import words_of

# What says how the components are loaded and used: one value for the whole list.
SHARED = (
    "encoder_weights",
    "transformer_weights",
    "decode",
    "dtype",
    "device",
    "batch_size",
    "cache",
    "vram",
    "stage_budget",
)
# A row that says one of these takes none of the others from what is the same for all.
EITHER = (("steps", "timesteps", "sigmas"), ("image", "start"))
# Of a single run: a refiner works on its pictures afterwards.
REFINING = ("refine", "refine_strength", "refiner")
REFINE_LATER = "is of a single run: leave it out, and refine a list's pictures with lowvram refine"


class Row(RunOptions, total=False):
    """What a row may say of its own: the options of `run` but for `SHARED`, and

    - prompt: what its pictures shall show; must be there.
    - output: x.png, in the list's folder unless it is a whole path; else a name is made of the
      row's number and prompt.
    """

    prompt: str
    output: str | Path


@dataclass(frozen=True)
class Listed:
    """A row of a list, or why it cannot be read.

    Attributes:
        line: of the file, counted from 1; None where there is none.
    """

    row: Row | LowvramError
    line: int | None = None


def resolve_rows(
    listed: Sequence[Listed], model: Model, folder: Path, options: Mapping[str, Any]
) -> list[Trip | LowvramError]:
    """The tasks of each row, or what is wrong with it.

    Args:
        folder: for pictures.
        options: what rows leave open.
    """
    digits = max(3, len(str(len(listed))))
    taken: dict[str, int] = {}  # paths, and the number of the row that writes there
    trips: list[Trip | LowvramError] = []
    for number, each in enumerate(listed, 1):
        try:
            if isinstance(each.row, LowvramError):
                raise each.row
            own = {**each.row}
            _check_texts(own)
            prompt, output = _prompt(own), own.pop("output", None)
            named = _named(folder, output) or folder / f"{number:0{digits}}-{words_of(prompt)}.png"
            merged: Any = _merged(options, own)
            tasks, image = (
                resolve_run(prompt, model, named, **merged),
                resolve_image(model, named, merged),
            )
            files = [task.output for task in (*tasks[:2], image) if task is not None]
            _claim(taken, number, files, named, len(tasks[1].seeds))
            trips.append(Trip(tasks, image))
        except LowvramError as error:
            trips.append(error)
    return trips


def others_of(said: Iterable[str]) -> set[str]:
    """Of what excludes each other, all that a row which says these does not take from elsewhere."""
    own = set(said)
    return {name for group in EITHER if own.intersection(group) for name in group}


def _check_texts(own: Mapping[str, Any]) -> None:
    """Refuse what no file can be named, and no report can say: half of a pair of surrogates."""
    for name, value in own.items():
        for each in value if isinstance(value, list | tuple) else [value]:
            try:
                os.fsencode(each if isinstance(each, str | Path) else "")
            except UnicodeEncodeError:
                raise RequestError(
                    f"{name} {str(each)!r} is not valid text: write it anew"
                ) from None


def _prompt(own: dict[str, Any]) -> str:
    prompt = own.pop("prompt", "")
    if not isinstance(prompt, str):
        raise RequestError(f"the prompt {prompt!r} is no text")
    return prompt


def _merged(options: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says, and of the rest what is the same for all."""
    allowed = [name for name in RunOptions.__annotations__ if name not in SHARED + REFINING]
    for name in own:
        if name in SHARED:
            raise RequestError(f"{name} is one for the whole list: say it once, and not in a row")
        if name in REFINING:
            raise RequestError(f"{name} {REFINE_LATER}")
        if name not in allowed:
            raise RequestError(
                f"a row has no {name!r}: use prompt, output, {', '.join(sorted(allowed))}"
            )
    dropped = others_of(name for name in own if own[name] is not None)
    return {k: v for k, v in options.items() if k not in dropped} | dict(own)


def _named(folder: Path, output: object) -> Path | None:
    """Where a row wants its picture; None where it does not say."""
    if output in (None, ""):
        return None
    if not isinstance(output, str | Path):
        raise RequestError(f"output {output!r} is no path: name a picture, x.png")
    if "\0" in str(output) or not is_unicode(str(output)):
        raise RequestError(f"output {str(output)!r} is no path: name a picture, x.png")
    path = folder / output
    return path if path.suffix else path.with_suffix(".png")


def _claim(
    taken: dict[str, int], number: int, files: Sequence[str], picture: Path, pictures: int
) -> None:
    """Keep two rows from writing to the same file.

    Raises:
        RequestError: an earlier row does.
    """
    paths = [*files, *map(str, picture_paths(picture, pictures))]
    keys = {os.path.normcase(os.path.abspath(path)): path for path in paths}
    for key, path in keys.items():
        if key in taken:
            raise RequestError(f"output {path} is row {taken[key]}'s already: name another")
    taken |= dict.fromkeys(keys, number)
