"""A prompt becomes a picture: the three stages in order, each in a process of its own.

What can be refused is refused before anything is loaded. Each stage's file is kept, so
that what failed can be done again from there. Imports no torch.
"""

import itertools
import logging
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from lowvram import artifacts
from lowvram.errors import LowvramError, MemoryExhaustedError, NothingSmallerError, RequestError
from lowvram.memory.report import table
from lowvram.memory.report_files import to_text
from lowvram.processes import StageProcesses
from lowvram.progress import OnProgress, ignore
from lowvram.repository import DEFAULT_MODEL, Model, resolve
from lowvram.request.encode_image import EncodeImageTask
from lowvram.request.run import RunOptions, Tasks, resolve_image, resolve_run
from lowvram.request.tasks import to_json
from lowvram.stages.dispatch import STAGES, carry_out

DEFAULT_FOLDER = Path("outputs")
Carry = Callable[[str, Mapping[str, Any], OnProgress], dict[str, Any]]

log = logging.getLogger(__name__)


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
        return {
            "images": [
                {
                    k: str(v) if isinstance(v, Path) else v
                    for k, v in vars(image).items()
                    if k != "unrefined" or v is not None
                }
                for image in self.images
            ],
            "stages": self.stages,
        }

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
        found = resolve(model, revision)
        if options.get("refine"):
            from lowvram.refining import run_and_refine  # it imports this module

            return run_and_refine(prompts, found, picture, processes, on_progress, **options)
        return make(prompts, found, picture, processes, on_progress, **options)


def make(
    prompts: str | Sequence[str],
    model: Model,
    picture: Path,
    processes: StageProcesses | None,
    on_progress: OnProgress,
    **options: Unpack[RunOptions],
) -> RunResult:
    """Make pictures, by a model that is found already; no refiner follows.

    Args:
        picture: x.png.
        processes: None to run all stages in this process.
    """
    tasks = resolve_run(prompts, model, picture, **options)
    image = resolve_image(model, picture, options)
    first = [] if image is None else [_encode_image(image, tasks, processes, on_progress)]
    return finished([*first, *run_stages(tasks, processes, on_progress)], tasks)


def _encode_image(
    image: EncodeImageTask,
    tasks: Tasks,
    processes: StageProcesses | None,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """The result of encode-image, before the three stages, all of which can be done then."""
    carry = processes.run if processes is not None else carry_out
    carry("check", to_json(tasks[1]), on_progress)
    if image.vram or image.stage_budget:
        every = dict(zip(STAGES, (to_json(task) for task in tasks), strict=True))
        carry("plan", {**every, "encode-image": to_json(image)}, on_progress)
    return stepping_down("encode-image", to_json(image), carry, on_progress)


def run_stages(
    tasks: Tasks,
    processes: StageProcesses | None,
    on_progress: OnProgress,
) -> list[dict[str, Any]]:
    """The result of each stage; an error says what is kept and how to go on."""
    carry = processes.run if processes is not None else carry_out
    if tasks[1].asks_the_scheduler:
        carry("check", to_json(tasks[1]), on_progress)
    if tasks[0].vram or tasks[0].stage_budget:  # what cannot fit is refused before any load
        every = zip(STAGES, (to_json(task) for task in tasks), strict=True)
        carry("plan", dict(every), on_progress)
    results: list[dict[str, Any]] = []
    for stage, task in zip(STAGES, (to_json(task) for task in tasks), strict=True):
        try:
            results.append(stepping_down(stage, task, carry, on_progress))
        except LowvramError as error:
            if not results:
                raise
            kept = results[-1]["paths"][0]
            raise type(error)(
                f"{error} (kept: {kept}; go on from it with {shlex.join(['lowvram', stage, kept])}"
                f" and the options of that stage)"
            ) from None
    return results


def stepping_down(
    stage: str, task: dict[str, Any], carry: Carry, on_progress: OnProgress
) -> dict[str, Any]:
    """A stage's result, by a way of working that takes less after each out-of-memory.

    Raises:
        MemoryExhaustedError: there is none that takes less.
    """
    first: MemoryExhaustedError | None = None
    for steps_down in itertools.count():
        try:
            return carry(stage, {**task, "steps_down": steps_down}, on_progress)
        except NothingSmallerError:
            assert first is not None  # it says that something has run out before
            raise first from None
        except MemoryExhaustedError as error:
            first = first or error
            log.warning("%s: trying what takes less", error)
    raise AssertionError("unreachable")


def finished(results: list[dict[str, Any]], tasks: Tasks) -> RunResult:
    """The pictures of finished stages, and the report beside them."""
    embeds, latents = Path(tasks[0].output), Path(tasks[1].output)
    report = Path(tasks[2].output).with_suffix(".report.json")
    decoded = results[-1]
    images = [
        Picture(
            path=Path(path),
            prompt=item["prompt"],
            seed=item["seed"],
            width=item["width"],
            height=item["height"],
            embeds=embeds,
            latents=latents,
            start=Path(tasks[1].start) if tasks[1].start else None,
        )
        for path, item in zip(decoded["paths"], decoded["items"], strict=True)
    ]
    return write_report(RunResult(images, [each["report"] for each in results], report))


def write_report(result: RunResult) -> RunResult:
    """Write its report, and return it."""
    artifacts.write_bytes(result.report, to_text(result.to_json()).encode())
    return result


def _picture_path(output: str | Path | None, prompts: Sequence[str]) -> Path:
    """Where the picture goes: as named, or a new name made of the prompt."""
    if output is not None and Path(output).suffix.lower() == ".png":
        return Path(output)
    if output is not None and Path(output).suffix and not Path(output).is_dir():
        raise RequestError(f"{output} is neither a folder nor ends in .png: pictures are PNG")
    return new_path(prompts, ".png", DEFAULT_FOLDER if output is None else Path(output))


def new_path(prompts: Sequence[str], suffix: str, folder: Path = DEFAULT_FOLDER) -> Path:
    """A path in the folder, named after the first prompt, that no earlier run has used."""
    words = re.findall(r"\w+", prompts[0].lower()) if prompts else []
    name = "-".join(words)[:60].rstrip("-") or "picture"
    number = 1
    while any(folder.glob(f"{name}{'' if number == 1 else f'-{number}'}.*")):
        number += 1
    return folder / f"{name}{'' if number == 1 else f'-{number}'}{suffix}"
