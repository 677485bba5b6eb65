"""A prompt becomes a picture: the three stages in order, each in a process of its own.

What can be refused is refused before anything is loaded. Each stage's file is kept, so
that what failed can be done again from there. Imports no torch.
"""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from lowvram import artifacts
from lowvram.course import Trip, carry_through
from lowvram.errors import RequestError
from lowvram.memory.report import table
from lowvram.memory.report_files import to_text
from lowvram.processes import StageProcesses
from lowvram.progress import OnProgress, ignore
from lowvram.repository import DEFAULT_MODEL, resolve
from lowvram.request.run import RunOptions, resolve_run
from lowvram.stages.dispatch import carry_out

DEFAULT_FOLDER = Path("outputs")


@dataclass(frozen=True)
class Picture:
    """One picture and the files it came from. Width and height in px."""

    path: Path
    prompt: str
    seed: int
    width: int
    height: int
    embeds: Path
    latents: Path

    def to_json(self) -> dict[str, Any]:
        """JSON types."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in vars(self).items()}


@dataclass(frozen=True)
class RunResult:
    """What `run` made.

    Attributes:
        images: the pictures, prompt by prompt.
        stages: the report of each stage (`StageReport.to_json()`).
        report: the JSON file of the same, beside the pictures.
    """

    images: list[Picture]
    stages: list[dict[str, Any]]
    report: Path

    def to_json(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return {"images": [image.to_json() for image in self.images], "stages": self.stages}

    def table(self) -> str:
        """Memory and time of each stage, for people."""
        return table(self.stages)


def run(
    prompts: str | Sequence[str],
    model: str = DEFAULT_MODEL,
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    in_process: bool = False,
    on_progress: OnProgress = ignore,
    **options: Unpack[RunOptions],
) -> RunResult:
    """Make pictures.

    Args:
        output: a picture (x.png), or a folder; None for a new file in `outputs/`.
        in_process: run all stages in this process, with the same release and check between them.
        options: those of the three stages; see `request.run.RunOptions`.

    Raises:
        LowvramError: see errors.py. What earlier stages made is kept, and the message names it.
    """
    with ExitStack() as stack:
        processes = None if in_process else stack.enter_context(StageProcesses())
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        picture = _picture_path(output, texts)
        trip = Trip(resolve_run(prompts, resolve(model, revision), picture, **options))
        carry = carry_out if processes is None else processes.run
        stages, _ = carry_through([trip], carry, on_progress)
    if trip.error is not None:
        raise trip.error
    result = RunResult(pictures_of(trip), stages, picture.with_suffix(".report.json"))
    artifacts.write_bytes(result.report, to_text(result.to_json()).encode())
    return result


def pictures_of(trip: Trip) -> list[Picture]:
    """What a trip that has arrived has made."""
    embeds, latents = Path(trip.tasks[0].output), Path(trip.tasks[1].output)
    decoded = trip.made[-1]
    return [
        Picture(
            path=Path(path),
            prompt=item["prompt"],
            seed=item["seed"],
            width=item["width"],
            height=item["height"],
            embeds=embeds,
            latents=latents,
        )
        for path, item in zip(decoded["paths"], decoded["items"], strict=True)
    ]


def _picture_path(output: str | Path | None, prompts: Sequence[str]) -> Path:
    """Where the picture goes: as named, or a new name made of the prompt."""
    if output is not None and Path(output).suffix.lower() == ".png":
        return Path(output)
    if output is not None and Path(output).suffix and not Path(output).is_dir():
        raise RequestError(f"{output} is neither a folder nor ends in .png: pictures are PNG")
    return new_path(prompts, ".png", DEFAULT_FOLDER if output is None else Path(output))


def new_path(prompts: Sequence[str], suffix: str, folder: Path = DEFAULT_FOLDER) -> Path:
    """A path in the folder, named after the first prompt, that no earlier run has used."""
    name = words_of(prompts[0] if prompts else "")
    number = 1
    while any(folder.glob(f"{name}{'' if number == 1 else f'-{number}'}.*")):
        number += 1
    return folder / f"{name}{'' if number == 1 else f'-{number}'}{suffix}"


def words_of(prompt: str) -> str:
    """The first words of a prompt as a part of a file's name."""
    words = re.findall(r"\w+", prompt.lower())
    name = "-".join(words)[:60].encode()[:120].decode(errors="ignore")  # a name may have 255 bytes
    return name.rstrip("-") or "picture"
