"""A list of rows becomes pictures: each stage loads its component once for all of them.

`rows.py` has what a row is. One that cannot be done is reported, and the others are made.
Imports no torch.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from lowvram import artifacts
from lowvram.course import Trip, carry_through
from lowvram.errors import LowvramError, RequestError, RowsFailedError
from lowvram.memory.report import table
from lowvram.memory.report_files import OF_LIST, to_text
from lowvram.names import new_folder
from lowvram.processes import StageProcesses
from lowvram.progress import OnProgress, ignore
from lowvram.repository import DEFAULT_MODEL
from lowvram.request.refine import DEFAULT_REFINER
from lowvram.request.run import RunOptions
from lowvram.rows import REFINE_LATER, REFINING, Listed, Row, resolve_rows
from lowvram.run import Picture, pictures_of
from lowvram.stages.dispatch import carry_out
from lowvram.swaps import resolve_with


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
            raise RequestError(f"--{option.replace('_', '-')} {REFINE_LATER}")
    if not listed:
        raise RequestError("the list has no rows: write a prompt a line")
    with _folder(output, name) as folder, ExitStack() as stack:
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


def _folder(output: str | Path | None, name: str) -> AbstractContextManager[Path]:
    """The list's folder: as named, or a new one."""
    if output is None:
        return new_folder(name)
    path = Path(output)
    if path.suffix.lower() == ".png" or os.path.isfile(path):
        raise RequestError(f"{output} is one file, and a list makes many: name a folder with -o")
    return nullcontext(path)


def _result(number: int, listed: Listed, trip: Trip | LowvramError) -> RowResult:
    if isinstance(trip, LowvramError):
        prompt = "" if isinstance(listed.row, LowvramError) else str(listed.row.get("prompt", ""))
        return RowResult(number, listed.line, prompt, [], trip)
    images = pictures_of(trip) if trip.error is None else []
    return RowResult(number, listed.line, trip.tasks.encode.prompts[0], images, trip.error)
