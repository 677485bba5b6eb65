"""A list of rows becomes pictures: each stage loads its component once for all of them.

A row says what it has of its own, a prompt at least; the rest is the same for all. One that cannot
be done is reported, and the others are made. Imports no torch.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from lowvram import artifacts
from lowvram.course import Trip, carry_through
from lowvram.errors import LowvramError, RequestError, RowsFailedError
from lowvram.memory.report import table
from lowvram.memory.report_files import OF_LIST, to_text
from lowvram.processes import StageProcesses
from lowvram.progress import OnProgress, ignore
from lowvram.repository import DEFAULT_MODEL, Model
from lowvram.request.checks import is_unicode
from lowvram.request.decode import picture_paths
from lowvram.request.refine import DEFAULT_REFINER
from lowvram.request.run import RunOptions, resolve_image, resolve_run
from lowvram.run import DEFAULT_FOLDER, Picture, pictures_of, words_of
from lowvram.stages.dispatch import carry_out
from lowvram.swaps import resolve_with

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
_REFINE_LATER = "is of a single run: leave it out, and refine a list's pictures with lowvram refine"


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
class RowResult:
    """What came of a row.

    Attributes:
        number: counted from 1.
        line: see `Listed`.
        prompt: "" where the row could not be read.
        images: empty where it failed.
        error: why; None where it did not.
    """

    number: int
    line: int | None
    prompt: str
    images: list[Picture]
    error: LowvramError | None

    def to_json(self) -> dict[str, Any]:
        """JSON types; of an error its "kind", "exit_code" and "message"."""
        error = self.error and {
            "kind": type(self.error).__name__,
            "exit_code": self.error.exit_code,
            "message": str(self.error),
        }
        return {
            "row": self.number,
            "line": self.line,
            "prompt": self.prompt,
            "images": [image.to_json() for image in self.images],
            "error": error,
        }

    def __str__(self) -> str:
        where = f"row {self.number}" + (f" (line {self.line})" if self.line else "")
        return f"{where}: {self.error or 'done'}"


@dataclass(frozen=True)
class BatchResult:
    """What `run_many` made.

    Attributes:
        rows: in the order of the list.
        stages: the report of each stage (`StageReport.to_json()`).
        report: the JSON file of the same, in the list's folder.
    """

    rows: list[RowResult]
    stages: list[dict[str, Any]]
    report: Path

    @property
    def images(self) -> list[Picture]:
        """Of all rows, in order."""
        return [image for row in self.rows for image in row.images]

    @property
    def failed(self) -> list[RowResult]:
        """The rows that could not be done."""
        return [row for row in self.rows if row.error is not None]

    def raise_failed(self) -> None:
        """Raise if any row failed.

        Raises:
            RowsFailedError: names how many, and the first.
        """
        if self.failed:
            count = f"{len(self.failed)} of {len(self.rows)} rows failed"
            raise RowsFailedError(f"{count}; the first of them is {self.failed[0]}")

    def to_json(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return {
            "rows": [row.to_json() for row in self.rows],
            "images": [image.to_json() for image in self.images],
            "stages": self.stages,
        }

    def table(self) -> str:
        """Memory and time of each stage, for people."""
        return table(self.stages)


def run_many(
    rows: Iterable[str | Row],
    model: str = DEFAULT_MODEL,
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    transformer: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    in_process: bool = False,
    on_progress: OnProgress = ignore,
    **options: Unpack[RunOptions],
) -> BatchResult:
    """Make the pictures of many rows, with each component loaded once.

    Args:
        rows: a prompt, or what a row says of its own; see `Row`.
        output: a folder; None for a new one in `outputs/`. A row's pictures have the same names
            in every run of the same list, and replace those of the last.
        transformer, vae, text_encoder: others than the model's: see `swaps.swap`.
        in_process: run all stages in this process, with the same release and check between them.
        options: what rows leave open, and `SHARED`; see `request.run.RunOptions`.

    Raises:
        LowvramError: nothing could be made, for a reason that is no single row's. What is wrong
            with a row is in its result; see `BatchResult.raise_failed`.
    """
    listed = [Listed({"prompt": row} if isinstance(row, str) else row) for row in rows]
    return run_listed(
        listed,
        model,
        output,
        "batch",
        revision=revision,
        transformer=transformer,
        vae=vae,
        text_encoder=text_encoder,
        in_process=in_process,
        on_progress=on_progress,
        **options,
    )


def run_listed(
    listed: Sequence[Listed],
    model: str,
    output: str | Path | None,
    name: str,
    *,
    revision: str | None = None,
    transformer: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    in_process: bool = False,
    on_progress: OnProgress = ignore,
    **options: Unpack[RunOptions],
) -> BatchResult:
    """`run_many` for rows that were read from a file, of which some may make no sense.

    Args:
        name: of the list, for a new folder.
    """
    for option in REFINING:
        if options.get(option) not in (None, False, DEFAULT_REFINER):
            raise RequestError(f"--{option.replace('_', '-')} {_REFINE_LATER}")
    if not listed:
        raise RequestError("the list has no rows: write a prompt a line")
    folder = _folder(output, name)
    with ExitStack() as stack:
        processes = None if in_process else stack.enter_context(StageProcesses())
        found = resolve_with(
            model, revision, transformer=transformer, vae=vae, text_encoder=text_encoder
        )
        resolved = resolve_rows(listed, found, folder, options)
        trips = [each for each in resolved if isinstance(each, Trip)]
        carry = carry_out if processes is None else processes.run
        stages, common = carry_through(trips, carry, on_progress)
    if common is not None and all(trip.error is not None for trip in trips):
        raise common
    rows = [
        _result(number, each, trip)
        for number, (each, trip) in enumerate(zip(listed, resolved, strict=True), 1)
    ]
    result = BatchResult(rows, stages, folder / OF_LIST)
    artifacts.write_bytes(result.report, to_text(result.to_json()).encode())
    return result


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
            raise RequestError(f"{name} {_REFINE_LATER}")
        if name not in allowed:
            raise RequestError(
                f"a row has no {name!r}: use prompt, output, {', '.join(sorted(allowed))}"
            )
    dropped = others_of(name for name in own if own[name] is not None)
    return {k: v for k, v in options.items() if k not in dropped} | dict(own)


def others_of(said: Iterable[str]) -> set[str]:
    """Of what excludes each other, all that a row which says these does not take from elsewhere."""
    own = set(said)
    return {name for group in EITHER if own.intersection(group) for name in group}


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


def _folder(output: str | Path | None, name: str) -> Path:
    """The list's folder: as named, or a new one."""
    if output is None:
        slug = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "batch"
        numbered = (DEFAULT_FOLDER / f"{slug}-{number}" for number in range(2, 1 << 30))
        first = DEFAULT_FOLDER / slug
        return first if not first.exists() else next(path for path in numbered if not path.exists())
    path = Path(output)
    if path.suffix.lower() == ".png" or path.is_file():
        raise RequestError(f"{output} is one file, and a list makes many: name a folder with -o")
    return path


def _result(number: int, listed: Listed, trip: Trip | LowvramError) -> RowResult:
    if isinstance(trip, LowvramError):
        prompt = "" if isinstance(listed.row, LowvramError) else str(listed.row.get("prompt", ""))
        return RowResult(number, listed.line, prompt, [], trip)
    images = pictures_of(trip) if trip.error is None else []
    return RowResult(number, listed.line, trip.tasks[0].prompts[0], images, trip.error)
