"""A prompt becomes a picture: the stages in order, each in a process of its own.

What can be refused is refused before anything is loaded. Each stage's file is kept, so
that what failed can be done again from there. Imports no torch.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from lowvram import artifacts
from lowvram.course import Carry, Trip, carry_through
from lowvram.errors import RequestError
from lowvram.memory.report import table
from lowvram.memory.report_files import to_text
from lowvram.names import DEFAULT_FOLDER, new_path
from lowvram.processes import StageProcesses
from lowvram.progress import OnProgress, ignore
from lowvram.repository import DEFAULT_MODEL
from lowvram.request.run import RunOptions, resolve_run
from lowvram.stages.dispatch import carry_out
from lowvram.stages.sampling import Callback, every
from lowvram.swaps import resolve_with


@dataclass(frozen=True)
class Picture:
    """One picture and the files it came from. Width and height in px.

    Attributes:
        unrefined: the picture before a refiner worked on it; None where none did.
        start: the latents that it was made from; None for noise alone.
    """

    path: Path
    prompt: str
    seed: int
    width: int
    height: int
    embeds: Path
    latents: Path
    start: Path | None = None
    unrefined: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON types."""
        return {
            k: str(v) if isinstance(v, Path) else v
            for k, v in vars(self).items()
            if k != "unrefined" or v is not None
        }


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
    transformer: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    in_process: bool = False,
    callback: Callback | None = None,
    callback_steps: int = 1,
    on_progress: OnProgress = ignore,
    **options: Unpack[RunOptions],
) -> RunResult:
    """Make pictures.

    Args:
        output: a picture (x.png), or a folder; None for a new file in `outputs/`.
        transformer, vae, text_encoder: others than the model's: see `swaps.swap`.
        in_process: run all stages in this process, with the same release and check between them.
        callback: called with step, timestep and latents after every `callback_steps`th step of
            denoising, but not of a refiner's; with `in_process` only, for latents do not travel
            between processes.
        options: those of all stages; see `request.run.RunOptions`.

    Raises:
        LowvramError: see errors.py. What earlier stages made is kept, and the message names it.
    """
    if callback is not None and not in_process:
        raise RequestError("a callback sees latents of this process only: set in_process=True")
    if callback_steps < 1:
        raise RequestError(f"callback_steps {callback_steps} is out of range: 1 or more")
    here = partial(carry_out, callback=every(callback_steps, callback))
    with ExitStack() as stack:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        picture = stack.enter_context(_picture_path(output, texts))
        processes = None if in_process else stack.enter_context(StageProcesses())
        found = resolve_with(
            model, revision, transformer=transformer, vae=vae, text_encoder=text_encoder
        )
        carry = here if processes is None else processes.run
        if options.get("refine"):
            from lowvram.refining import run_and_refine  # it imports this module

            unheard = carry_out if processes is None else processes.run
            carries = (carry, unheard)
            return run_and_refine(prompts, found, picture, carries, on_progress, **options)
        tasks = resolve_run(prompts, found, picture, **options)
        return arrive(Trip(tasks), carry, on_progress)


def arrive(trip: Trip, carry: Carry, on_progress: OnProgress) -> RunResult:
    """Take a trip through all its stages; its pictures, with the report beside them."""
    stages, _ = carry_through([trip], carry, on_progress)
    if trip.error is not None:
        raise trip.error
    report = Path(trip.tasks.decode.output).with_suffix(".report.json")
    return write_report(RunResult(pictures_of(trip), stages, report))


def pictures_of(trip: Trip) -> list[Picture]:
    """What a trip that has arrived has made."""
    embeds, latents = Path(trip.tasks.encode.output), Path(trip.tasks.denoise.output)
    decoded, start = trip.made["decode"], trip.tasks.denoise.start
    return [
        Picture(
            path=Path(path),
            prompt=item["prompt"],
            seed=item["seed"],
            width=item["width"],
            height=item["height"],
            embeds=embeds,
            latents=latents,
            start=Path(start) if start else None,
        )
        for path, item in zip(decoded["paths"], decoded["items"], strict=True)
    ]


def write_report(result: RunResult) -> RunResult:
    """Write its report, and return it."""
    artifacts.write_bytes(result.report, to_text(result.to_json()).encode())
    return result


def _picture_path(
    output: str | Path | None, prompts: Sequence[str]
) -> AbstractContextManager[Path]:
    """Where the picture goes: as named, or a new name made of the prompt, as long as this lasts."""
    if output is not None and Path(output).suffix.lower() == ".png":
        return nullcontext(Path(output))
    if output is not None and Path(output).suffix and not os.path.isdir(output):
        raise RequestError(f"{output} is neither a folder nor ends in .png: pictures are PNG")
    return new_path(prompts, ".png", DEFAULT_FOLDER if output is None else Path(output))
