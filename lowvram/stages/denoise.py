"""Denoise: embeddings to latents, with the transformer alone on the device."""

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts, prepared
from lowvram.component import use
from lowvram.devices import choose_device, choose_dtype, dtype_name
from lowvram.errors import RequestError, translated
from lowvram.files import sha256_of
from lowvram.memory.meter import Meter
from lowvram.progress import OnProgress, Progress, ignore
from lowvram.repository import Model
from lowvram.request.denoise import DenoiseTask
from lowvram.stages.checkpoints import Checkpoints
from lowvram.stages.groups import Group, Job, computed_alike, grouped, most_demanding
from lowvram.stages.previews import OnPreview, Previews, colours_of, path_of
from lowvram.stages.result import (
    Made,
    OnOutcome,
    Outcomes,
    StageResult,
    StageResults,
    report_stage,
    shared_settings,
    sized,
    unheard,
)
from lowvram.stages.sampling import Callback, Network, denoise_all, every
from lowvram.stages.schedule import SchedulerMaker, scheduler_maker
from lowvram.stages.starts import begin, latent_shape, read_latents, start_settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowvram.stages.decision import Decision
    from lowvram.stages.options.transformer import Placed

_OR_STREAM = ", or --weights stream (run: --transformer-weights stream)"

log = logging.getLogger(__name__)


def denoise(
    task: DenoiseTask,
    on_progress: OnProgress = ignore,
    callback: Callback | None = None,
    callback_steps: int = 1,
    on_preview: OnPreview | None = None,
) -> StageResult:
    """Write the latents of every picture to `task.output`.

    Args:
        callback: called with step, timestep and latents after every `callback_steps`th step.
        on_preview: called with step and levels `[pictures, height, width, 3]` of each preview.

    Raises:
        ArtifactError: the embeddings are damaged or of another kind.
        RequestError: the model's scheduler cannot do what was asked.
        ModelError, DeviceError, MemoryExhaustedError, StorageError: as their names say.
        NonFiniteError: the transformer computed NaN or infinity; nothing is written.
    """
    if callback_steps < 1:
        raise RequestError(f"callback_steps {callback_steps} is out of range: 1 or more")
    if callback is None and callback_steps > 1:
        raise RequestError(f"callback_steps {callback_steps} has no effect without a callback")
    own = every(callback_steps, callback)
    return denoise_each([task], on_progress, callback=own, on_preview=on_preview).only()


@translated("denoise")
def denoise_each(
    tasks: Sequence[DenoiseTask],
    on_progress: OnProgress = ignore,
    on_outcome: OnOutcome = unheard,
    callback: Callback | None = None,
    on_preview: OnPreview | None = None,
) -> StageResults:
    """Write the latents of every task, with the transformer loaded once.

    Args:
        tasks: of one model, and alike in weights, dtype, device, batch size and budgets. Pictures
            of those that are computed alike share batches.
        on_outcome: told of each task as soon as its file is written, or what went wrong with it.

    Raises:
        ModelError, DeviceError, MemoryExhaustedError: what concerns all tasks that are left.
    """
    on_progress(Progress("denoise", "reading the embeddings"))
    task = tasks[0]
    outcomes = Outcomes(len(tasks), on_outcome)
    model = Model.from_record(task.model)
    component = model.get_family().component("transformer")
    device = choose_device(task.device, warns=True)
    dtype, dtype_reason = choose_dtype(task.dtype, component.dtype, device)
    groups = grouped(tasks, model, outcomes)
    for note in dict.fromkeys(note for group in groups for note in group.make_scheduler.notes()):
        log.warning("%s", note)
    previews_of = _previews(groups, model, on_progress, on_preview)  # the VAE comes first
    jobs = {job.index: (job, group.make_scheduler) for group in groups for job in group.jobs}
    settings: list[dict[str, Any]] = []
    with Meter(device) as meter:
        decision = _decide(groups, model, device, dtype, outcomes)
        if decision is None:
            return StageResults(outcomes.in_order(), None)
        placed = decision.strategy
        folder, note = prepared.fetch(model, "transformer", "whole", dtype_name(dtype))
        reasons = [
            f"weights {placed.weights.name}: {decision.reason}",
            f"{dtype_name(dtype)}: {dtype_reason}",
            *([note] if note else []),
        ]
        log.info("denoise on %s, %s", device, "; ".join(reasons))
        on_progress(Progress("denoise", "loading the transformer"))

        @cache  # it reads files that a job starts from
        def header_of(index: int) -> artifacts.Header:
            job, maker = jobs[index]
            return _header(job, maker, dtype_name(dtype), device.type, placed)

        def checkpoints_of(job: Job) -> Checkpoints:
            header = header_of(job.index)
            return Checkpoints(Path(job.task.output), header, job.task.checkpoint_every)

        def write(job: Job) -> None:
            header = header_of(job.index)
            pictures = [job.finished[number] for number in range(len(job.items))]
            artifacts.write(Path(job.task.output), header, {"latents": _joined(pictures)})
            checkpoints_of(job).remove()
            settings.append(header.settings)
            made = Made([Path(job.task.output)], sized(job.items, job.task.requested))
            outcomes.settle(job.index, made)

        used = use(
            component.class_name,
            folder,
            placed.weights,
            device,
            meter,
            decision.room,
            lambda loaded: denoise_all(
                groups,
                Network(loaded, device, dtype, placed.savings),
                outcomes,
                on_progress,
                callback,
                meter.mark,
                write,
                checkpoints_of,
                previews_of,
            ),
        )
    report = report_stage(
        meter,
        "denoise",
        placed.weights.name,
        dtype_name(dtype),
        reasons,
        used,
        {"model": model.public_record()["name"], **shared_settings(settings or [{}])},
        decision,
    )
    return StageResults(outcomes.in_order(), report)


def _previews(
    groups: Sequence[Group], model: Model, on_progress: OnProgress, on_preview: OnPreview | None
) -> Callable[[DenoiseTask], Previews | None]:
    """Gives what writes previews for the tasks that ask for them."""
    if on_preview is not None and not all(group.task.preview for group in groups):
        raise RequestError("on_preview is never called without preview: give preview=5")
    if not any(group.task.preview for group in groups):
        return lambda task: None
    vae, family, colours = model.config("vae"), model.get_family(), colours_of(model, on_progress)

    def previews_of(task: DenoiseTask) -> Previews | None:
        if not task.preview:
            return None
        return Previews(
            path_of(Path(task.output)),
            task.preview,
            colours,
            lambda latents: family.unscale(latents, vae),
            on_preview,
        )

    return previews_of


def _decide(
    groups: list[Group],
    model: Model,
    device: "torch.device",
    dtype: "torch.dtype",
    outcomes: Outcomes,
) -> "Decision[Placed] | None":
    """One way of working for all groups; those with the largest batch may be given up for it."""
    from lowvram.stages.decision import decide, decide_for_all
    from lowvram.stages.options.transformer import transformer_options  # imports torch

    def decide_for(groups: Sequence[Group]) -> "Decision[Placed]":
        task, steps = groups[0].task, most_demanding(groups)
        return decide(
            "denoise",
            task,
            device,
            dtype_name(dtype),
            partial(transformer_options, model, task.weights, dtype, device, steps=steps),
            _OR_STREAM if task.weights == "whole" else "",
        )

    def largest_of(groups: Sequence[Group]) -> list[Group]:
        shape = most_demanding(groups).shape
        return [each for each in groups if (each.pictures_at_once, *each.shape) == shape]

    def tasks_of(group: Group) -> list[int]:
        return [job.index for job in group.jobs]

    return decide_for_all(groups, decide_for, largest_of, tasks_of, outcomes)


def _header(
    job: Job, maker: SchedulerMaker, dtype: str, device: str, placed: "Placed"
) -> artifacts.Header:
    return artifacts.Header(
        kind="latents",
        model=job.task.model,
        settings=_settings(job.task, dtype, device, maker)
        | {"weights": placed.weights.name, **placed.savings.settings()}
        | start_settings(job.task),
        items=job.items,
        made_from=job.header.key,
    )


def _joined(pictures: "list[Tensor]") -> "Tensor":
    import torch

    return torch.cat(pictures)


def check_each(tasks: Sequence[DenoiseTask], on_outcome: OnOutcome) -> None:
    """Find out before anything is loaded whether the model's scheduler can do each task.

    Args:
        on_outcome: told of those that it cannot do: `RequestError`, `ModelError`.
    """
    outcomes = Outcomes(len(tasks), on_outcome)
    tried: set[str] = set()  # a trial takes up to 0.7 s (DPM2)
    for index, task in enumerate(tasks):
        with outcomes.of(index):
            model, alike = Model.from_record(task.model), computed_alike(task)
            if alike not in tried:
                begin(task, scheduler_maker(task, model)("cpu"))
                tried.add(alike)
            read_latents(task, (len(task.seeds), *latent_shape(task, model)))


def _settings(
    task: DenoiseTask, dtype: str, device: str, scheduler: SchedulerMaker
) -> dict[str, Any]:
    """Every setting that changed a byte."""
    return {
        "steps": scheduler.steps,
        "timesteps": list(task.timesteps),
        "sigmas": list(task.sigmas),
        "guidance_scale": task.guidance_scale,
        **({"aesthetic_scores": list(task.aesthetic_scores)} if task.aesthetic_scores else {}),
        "eta": task.eta,
        "requested": list(task.requested),
        "rendered": list(task.rendered),
        "starting_latents": sha256_of(task.latents) if task.latents else "",
        "scheduler": scheduler.kind.__name__,
        "scheduler_settings": dict(scheduler.settings),
        "dtype": dtype,
        "device": device,
        "batch_size": task.batch_size,
    }
