"""What the commands share: progress on stderr, results on stdout."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.artifacts import SUFFIXES
from lowvram.memory.report_files import to_text

if TYPE_CHECKING:
    from lowvram.batch import BatchResult
    from lowvram.progress import OnProgress
    from lowvram.run import RunResult
    from lowvram.stages.result import StageResult


def showing_progress(loads_here: bool = True) -> "AbstractContextManager[OnProgress]":
    """Show progress; and where models are loaded in this process, keep the libraries quiet."""
    from lowvram.terminal import quiet_environment, quiet_libraries, terminal

    quiet_environment()
    if loads_here:
        quiet_libraries()
    return terminal()


def beside(path: Path, suffix: str) -> Path:
    """x.embeds.safetensors to x.latents.safetensors or x.png."""
    known = next((each for each in SUFFIXES.values() if path.name.endswith(each)), path.suffix)
    return path.with_name(path.name.removesuffix(known) + suffix)


def print_stage(result: "StageResult", as_json: bool, made: Mapping[str, Any]) -> None:
    """A stage's result: the files it made and its row of the table, or the JSON document.

    Args:
        made: what the document says of the files, beside the report.
    """
    report = result.report.to_json()
    if as_json:
        return print_json({**made, "stages": [report]})
    from lowvram.memory.report import table

    for path in result.paths:
        print(path)
    print(f"\n{table([report])}")


def images_of(
    result: "StageResult", files: Sequence[Mapping[str, str | None]]
) -> list[dict[str, Any]]:
    """The records of a stage's pictures, each with its files."""
    shown = ("prompt", "seed", "width", "height")
    return [
        {**{name: item[name] for name in shown}, **each}
        for item, each in zip(result.items, files, strict=True)
    ]


def print_run(result: "RunResult | BatchResult", as_json: bool) -> None:
    """What a run has made: its pictures and the table, or the JSON document."""
    if as_json:
        return print_json(result.to_json())
    for image in result.images:
        print(image.path)
    print(f"\n{result.table()}")


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    print(to_text(document), end="")
