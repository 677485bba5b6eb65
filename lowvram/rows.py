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
from lowvram.names import words_of
from lowvram.repository import Model
from lowvram.request.checks import is_unicode
from lowvram.request.decode import picture_paths
from lowvram.request.run import RunOptions, resolve_run
from lowvram.request.start import SavedLatents
from lowvram.request.tasks import Tasks

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
# The options that name a file to start from.
_INPUTS = ("image", "start", "latents", "embeds")
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


@dataclass(frozen=True)
class _Wish:
    """A row with what it leaves open; the tasks are still to be made of it."""

    prompt: str
    picture: Path
    options: dict[str, Any]


def resolve_rows(
    listed: Sequence[Listed], model: Model, folder: Path, options: Mapping[str, Any]
) -> list[Trip | LowvramError]:
    """The tasks of each row, or what is wrong with it.

    Args:
        folder: for pictures.
        options: what rows leave open.
    """
    digits = max(3, len(str(len(listed))))
    wishes: list[_Wish | LowvramError] = []
    for number, each in enumerate(listed, 1):
        try:
            wishes.append(_wish(each, f"{number:0{digits}}", folder, options))
        except LowvramError as error:
            wishes.append(error)
    places = _Places()
    for number, wish in enumerate(wishes, 1):
        if isinstance(wish, _Wish):
            places.note_inputs(number, wish.options)
    trips: list[Trip | LowvramError] = []
    for number, wish in enumerate(wishes, 1):
        try:
            if isinstance(wish, LowvramError):
                raise wish
            wanted: Any = wish.options
            tasks = resolve_run(wish.prompt, model, wish.picture, **wanted)
            places.claim(number, _outputs(tasks, wish.picture))
            trips.append(Trip(tasks))
        except LowvramError as error:
            trips.append(error)
    return trips


def others_of(said: Iterable[str]) -> set[str]:
    """Of what excludes each other, all that a row which says these does not take from elsewhere."""
    own = set(said)
    return {name for group in EITHER if own.intersection(group) for name in group}


def _wish(listed: Listed, number: str, folder: Path, options: Mapping[str, Any]) -> _Wish:
    """What a row asks for, with what it leaves open.

    Raises:
        LowvramError: the row could not be read, or makes no sense.
    """
    if isinstance(listed.row, LowvramError):
        raise listed.row
    own = {**listed.row}
    _check_texts(own)
    prompt, output = _prompt(own), own.pop("output", None)
    picture = _named(folder, output) or folder / f"{number}-{words_of(prompt)}.png"
    return _Wish(prompt, picture, _merged(options, own))


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
        if name in _INPUTS and "\0" in str(value):
            raise RequestError(f"{name} {str(value)!r} is no path: name a file")


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


def _outputs(tasks: Tasks, picture: Path) -> list[str]:
    """All that a row writes: its pictures, and the files beside them."""
    files = [task.output for stage, task in tasks.by_stage().items() if stage != "decode"]
    return [*files, *map(str, picture_paths(picture, len(tasks.denoise.seeds)))]


class _Places:
    """Which row reads a file, and which writes it: no row may write what another does."""

    def __init__(self) -> None:
        self._read: dict[str, int] = {}
        self._written: dict[str, int] = {}

    def note_inputs(self, number: int, options: Mapping[str, Any]) -> None:
        """What a row reads, whatever becomes of it: a link, and what it leads to."""
        for name in _INPUTS:
            given = options.get(name)
            path = given.path if isinstance(given, SavedLatents) else given
            if path is not None:
                for each in (path, os.path.realpath(path)):
                    self._read.setdefault(_key(each), number)

    def claim(self, number: int, paths: Sequence[str]) -> None:
        """Take the files that a row writes.

        Raises:
            RequestError: an earlier row writes one of them, or some row reads it.
        """
        keys = {_key(path): path for path in paths}
        for key, path in keys.items():
            if key in self._written:
                raise RequestError(
                    f"output {path} is row {self._written[key]}'s already: name another"
                )
            if key in self._read:
                raise RequestError(
                    f"{path} would be overwritten, and row {self._read[key]} starts from it: "
                    "name another output"
                )
        self._written |= dict.fromkeys(keys, number)


def _key(path: str | Path) -> str:
    """Equal for all ways to say where a file is; a link is a file of its own, as for writing."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.normcase(os.path.join(os.path.realpath(folder), name))
