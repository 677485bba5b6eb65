"""A refiner at work: what a picture is already becomes finer, in four stages that run alone.

    lowvram refine cactus.png "a cactus with a happy face"

Encode and encode-image (the picture, through the VAE), denoise from there, decode. Imports
no torch.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from lowvram.course import Carry, Trip, refuse
from lowvram.errors import LowvramError, RequestError
from lowvram.processes import StageProcesses
from lowvram.progress import OnProgress, ignore
from lowvram.repository import Model, resolve
from lowvram.request.decode import picture_paths
from lowvram.request.refine import (
    DEFAULT_REFINER,
    RefineOptions,
    refining_of_run,
    resolve_refine,
    unrefined,
)
from lowvram.request.run import RunOptions, check_kept, resolve_run
from lowvram.run import RunResult, arrive, write_report
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
    paths = [Path(pictures)] if isinstance(pictures, str | Path) else [Path(p) for p in pictures]
    if not paths:
        raise RequestError("there is no picture to refine: name one")
    target = paths[0].with_name(f"{paths[0].stem}-refined.png") if output is None else Path(output)
    written = {path.resolve() for path in picture_paths(target, len(paths))}
    for path in paths:
        if path.resolve() in written:
            raise RequestError(f"{path} would be overwritten: name another picture with -o")
    with ExitStack() as stack:
        carry: Carry = carry_out if in_process else stack.enter_context(StageProcesses()).run
        tasks = resolve_refine(paths, prompts, resolve(model, revision), target, **options)
        return arrive(Trip(tasks), carry, on_progress)


def run_and_refine(
    prompts: str | Sequence[str],
    model: Model,
    picture: Path,
    carries: tuple[Carry, Carry],
    on_progress: OnProgress,
    **options: Unpack[RunOptions],
) -> RunResult:
    """A run whose pictures a refiner works on. Its own lie beside: x-unrefined.png for x.png.

    Args:
        picture: x.png, the refined one.
        carries: carry out a stage of the run and of the refiner, here or in a process of its own.
        options: as `run` takes them.
    """
    tasks = resolve_run(prompts, model, unrefined(picture), **options)
    image = options.get("image")
    if image is not None:
        check_kept(image, picture)  # resolve_run has looked at what is not refined
    more = Trip(
        refining_of_run(
            tasks,
            picture,
            options.get("refine_strength"),
            options.get("refiner", DEFAULT_REFINER),
        )
    )
    carry, carry_refiner = carries
    refuse([more], carry_refiner, on_progress)
    if more.error is not None:
        raise more.error
    before = arrive(Trip(tasks), carry, on_progress)
    try:
        after = arrive(more, carry_refiner, on_progress)
    except LowvramError as error:
        kept = ", ".join(str(image.path) for image in before.images[:3])
        raise type(error)(f"{error} (the pictures are kept unrefined: {kept})") from None
    stages = [{**each, "stage": f"refine: {each['stage']}"} for each in after.stages]
    images = [
        replace(image, unrefined=other.path)
        for image, other in zip(after.images, before.images, strict=True)
    ]
    return write_report(replace(after, images=images, stages=[*before.stages, *stages]))
