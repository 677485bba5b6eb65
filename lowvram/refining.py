"""A refiner at work: what a picture is already becomes finer, in four stages that run alone.

    lowvram refine cactus.png "a cactus with a happy face"

Encode and encode-image (the picture, through the VAE), denoise from there, decode. Imports
no torch.
"""

import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from lowvram.errors import LowvramError, RequestError
from lowvram.processes import StageProcesses
from lowvram.progress import OnProgress, ignore
from lowvram.repository import Model, resolve
from lowvram.request.refine import (
    DEFAULT_REFINER,
    RefineOptions,
    Refining,
    refining_of_run,
    resolve_refine,
    unrefined,
)
from lowvram.request.run import RunOptions, resolve_run
from lowvram.request.tasks import to_json
from lowvram.run import Carry, RunResult, finished, make, stepping_down, write_report
from lowvram.stages.dispatch import carry_out


def refine(
    pictures: str | Path | Sequence[str | Path],
    prompts: str | Sequence[str],
    model: str = DEFAULT_REFINER,
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    in_process: bool = False,
    on_progress: OnProgress = ignore,
    **options: Unpack[RefineOptions],
) -> RunResult:
    """Refine pictures: each keeps its size.

    Args:
        pictures: files, all of one size.
        prompts: what they show: one for all, or one for each.
        output: x.png, for several x-0.png, …; None for x-refined.png beside the first.
        in_process: run all stages in this process.
        options: see `request.refine.resolve_refine`.

    Raises:
        LowvramError: see errors.py. What earlier stages made is kept.
    """
    with ExitStack() as stack:
        processes = None if in_process else stack.enter_context(StageProcesses())
        carry: Carry = carry_out if processes is None else processes.run
        first = Path(pictures if isinstance(pictures, str | Path) else next(iter(pictures)))
        target = first.with_name(f"{first.stem}-refined.png") if output is None else Path(output)
        if first.resolve() == target.resolve():
            raise RequestError(f"{target} is the picture itself: name another file with -o")
        tasks = resolve_refine(pictures, prompts, resolve(model, revision), target, **options)
        check_refining(tasks, carry, on_progress)
        results = run_refining(tasks, carry, on_progress)
    return finished(results, (tasks[0], tasks[2], tasks[3]))


def run_and_refine(
    prompts: str | Sequence[str],
    model: Model,
    picture: Path,
    processes: StageProcesses | None,
    on_progress: OnProgress,
    **options: Unpack[RunOptions],
) -> RunResult:
    """A run whose pictures a refiner works on. Its own lie beside: x-unrefined.png for x.png.

    Args:
        picture: x.png, the refined one.
        processes: None to run all stages in this process.
        options: as `run` takes them.
    """
    carry: Carry = carry_out if processes is None else processes.run
    tasks = resolve_run(prompts, model, unrefined(picture), **options)
    more = refining_of_run(
        tasks,
        picture,
        options.get("refine_strength"),
        options.get("refiner", DEFAULT_REFINER),
    )
    check_refining(more, carry, on_progress)
    before = make(prompts, model, unrefined(picture), processes, on_progress, **options)
    try:
        second = run_refining(more, carry, on_progress)
    except LowvramError as error:
        kept = ", ".join(str(image.path) for image in before.images[:3])
        raise type(error)(f"{error} (the pictures are kept unrefined: {kept})") from None
    for result in second:
        result["report"]["stage"] = f"refine: {result['report']['stage']}"
    after = finished(second, (more[0], more[2], more[3]))
    images = [
        replace(image, unrefined=other.path)
        for image, other in zip(after.images, before.images, strict=True)
    ]
    return write_report(replace(after, images=images, stages=[*before.stages, *after.stages]))


def check_refining(tasks: Refining, carry: Carry, on_progress: OnProgress) -> None:
    """Refuse before anything is loaded what cannot be done, or not within the budget.

    Args:
        carry: carries out a stage, here or in a process of its own.
    """
    carry("check", to_json(tasks[2]), on_progress)
    if tasks[0].vram or tasks[0].stage_budget:
        carry("plan", _by_stage(tasks), on_progress)


def run_refining(tasks: Refining, carry: Carry, on_progress: OnProgress) -> list[dict[str, Any]]:
    """The result of each stage; an error says what is kept and how to go on."""
    encode, image, denoise, _ = tasks
    ways = {
        "denoise": ["lowvram", "denoise", encode.output, "--start", image.output],
        "decode": ["lowvram", "decode", denoise.output],
    }
    results: list[dict[str, Any]] = []
    for stage, task in _by_stage(tasks).items():
        try:
            results.append(stepping_down(stage, task, carry, on_progress))
        except LowvramError as error:
            if stage not in ways:
                raise
            raise type(error)(
                f"{error} (kept: {results[-1]['paths'][0]}; go on from it with "
                f"{shlex.join(ways[stage])} and the options of that stage)"
            ) from None
    return results


def _by_stage(tasks: Refining) -> dict[str, dict[str, Any]]:
    """Each stage's task, in the order in which they are done."""
    encode, image, denoise, decode = tasks
    return {
        "encode-image": to_json(image),
        "encode": to_json(encode),
        "denoise": to_json(denoise),
        "decode": to_json(decode),
    }
