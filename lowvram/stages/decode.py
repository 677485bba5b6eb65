"""Decode: latents to pictures, with the VAE alone on the device."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts
from lowvram.component import use
from lowvram.devices import choose_device, choose_dtype, dtype_name
from lowvram.errors import NonFiniteError, translated
from lowvram.memory.budget import untracked
from lowvram.memory.meter import Meter
from lowvram.pixels import png
from lowvram.pixels.fit import cut, fit, to_levels
from lowvram.pixels.strategy import Pixels
from lowvram.progress import OnProgress, Progress, ignore, within
from lowvram.repository import Model
from lowvram.request.decode import DecodeTask, picture_paths
from lowvram.stages.result import (
    Made,
    OnOutcome,
    Outcomes,
    StageResult,
    StageResults,
    in_batches,
    report_stage,
    sized,
    unheard,
)
from lowvram.weights.whole import Whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowvram.stages.decision import Decision

_OR_STRIPS = ", or --decode strips"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One task.

    Attributes:
        index: of the task in the stage's list.
        header: of its latents.
        shape: of these, `[pictures, channels, height, width]`.
        paths: of its pictures.
    """

    index: int
    task: DecodeTask
    header: artifacts.Header
    shape: tuple[int, ...]
    paths: list[Path]


def decode(task: DecodeTask, on_progress: OnProgress = ignore) -> StageResult:
    """Write every picture: `task.output`, or for several x-0.png, x-1.png, … beside it.

    Raises:
        ArtifactError: the latents are damaged or of another kind.
        ModelError, DeviceError, MemoryExhaustedError, StorageError: as their names say.
        NonFiniteError: the VAE computed NaN or infinity; that picture is not written.
    """
    return decode_each([task], on_progress).only()


@translated("decode")
def decode_each(
    tasks: Sequence[DecodeTask],
    on_progress: OnProgress = ignore,
    on_outcome: OnOutcome = unheard,
) -> StageResults:
    """Write the pictures of every task, with the VAE loaded once.

    Args:
        tasks: of one model, and alike in all but latents and output. Pictures of one size share
            batches.
        on_outcome: told of each task as soon as its last picture is written, or what went wrong
            with it.

    Raises:
        ModelError, DeviceError, MemoryExhaustedError: what concerns all tasks that are left.
    """
    from lowvram.stages.options.pixels import ENCODER_HALF  # imports torch

    task = tasks[0]
    outcomes = Outcomes(len(tasks), on_outcome)
    model = Model.from_record(task.model)
    component = model.get_family().component("vae")
    device = choose_device(task.device, warns=True)
    dtype, dtype_reason = choose_dtype(task.dtype, component.dtype, device, model.vae_upcasts)
    groups = _grouped(tasks, outcomes)
    decision = _decide(groups, model, device, dtype, outcomes)
    if decision is None:
        return StageResults(outcomes.in_order(), None)
    pixels = decision.strategy
    reasons = [f"decode {pixels.name}: {decision.reason}", f"{dtype_name(dtype)}: {dtype_reason}"]
    log.info("decode on %s, %s", device, "; ".join(reasons))
    settings = {
        "dtype": dtype_name(dtype),
        "device": device.type,
        **pixels.settings(),
        "batch_size": task.batch_size,
    }
    with Meter(device) as meter:
        on_progress(Progress("decode", "loading the VAE"))
        used = use(
            component.class_name,
            model.fetch("vae"),
            Whole(dtype, without=ENCODER_HALF),
            device,
            meter,
            decision.room,
            lambda loaded: _decode_all(
                groups,
                model,
                loaded.model,
                pixels,
                device,
                settings,
                outcomes,
                on_progress,
                meter.mark,
            ),
        )
    report = report_stage(
        meter,
        "decode",
        pixels.name,
        dtype_name(dtype),
        reasons,
        used,
        {"model": model.public_record()["name"], **settings},
        decision,
    )
    return StageResults(outcomes.in_order(), report)


def _grouped(tasks: Sequence[DecodeTask], outcomes: Outcomes) -> list[list[Job]]:
    """The tasks that can be done, those together whose latents have one shape and dtype."""
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for index, task in enumerate(tasks):
        with outcomes.of(index):
            header = artifacts.verify(Path(task.latents), "latents")
            described = header.tensors["latents"]
            shape = tuple(described["shape"])
            paths = picture_paths(Path(task.output), len(header.items))
            job = Job(index, task, header, shape, paths)
            groups.setdefault((described["dtype"], *shape[1:]), []).append(job)
    return list(groups.values())


def _batch_shape(jobs: list[Job]) -> tuple[int, ...]:
    pictures = sum(job.shape[0] for job in jobs)
    return (min(jobs[0].task.batch_size, pictures), *jobs[0].shape[1:])


def _decide(
    groups: list[list[Job]],
    model: Model,
    device: "torch.device",
    dtype: "torch.dtype",
    outcomes: Outcomes,
) -> "Decision[Pixels] | None":
    """One way of decoding for all groups; the largest may be given up for it."""
    from lowvram.stages.decision import decide, decide_for_all
    from lowvram.stages.options.pixels import pixels_options  # imports torch

    def largest(groups: Sequence[list[Job]]) -> list[Job]:
        return max(groups, key=lambda jobs: prod(_batch_shape(jobs)))

    def decide_for(groups: Sequence[list[Job]]) -> "Decision[Pixels]":
        task, shape = largest(groups)[0].task, _batch_shape(largest(groups))
        pictures = sum(job.shape[0] for jobs in groups for job in jobs)
        return decide(
            "decode",
            task,
            device,
            dtype_name(dtype),
            partial(
                pixels_options,
                model,
                task.decode,
                dtype,
                device,
                shape=shape,
                batches=-(-pictures // shape[0]),
                folder=Path(task.output).parent,
            ),
            _OR_STRIPS if task.decode in ("whole", "blended") else "",
        )

    return decide_for_all(
        groups,
        decide_for,
        lambda groups: [largest(groups)],
        lambda jobs: [job.index for job in jobs],
        outcomes,
    )


def _decode_all(
    groups: list[list[Job]],
    model: Model,
    vae: "nn.Module",
    pixels: Pixels,
    device: "torch.device",
    settings: dict[str, Any],
    outcomes: Outcomes,
    on_progress: OnProgress,
    on_picture: Callable[[str], None],
) -> None:
    """Decode batch by batch; each picture is on disk before the next batch begins."""
    import torch

    family, config = model.get_family(), model.config("vae")
    dtype = next(vae.parameters()).dtype
    total = sum(job.shape[0] for jobs in groups for job in jobs)
    done = 0
    for jobs in groups:
        for batch in in_batches(_pictures(jobs, outcomes), jobs[0].task.batch_size):
            with untracked():
                latents = torch.cat([each for _, _, each in batch])
            scaled = family.unscale(latents.to(dtype), config)
            on_work = within(on_progress, "decode", "decoding", done, len(batch), total)
            made = pixels.decode(vae, scaled, device, on_work)
            for (job, index, _), picture in zip(batch, made, strict=True):
                with outcomes.of(job.index):
                    _save(job, index, picture, settings, model)
                    if index == len(job.paths) - 1:
                        made_items = sized(job.header.items, job.header.settings["requested"])
                        outcomes.settle(job.index, Made(job.paths, made_items))
                done += 1
                on_picture(f"picture {done}")
                on_progress(Progress("decode", "decoding", 100 * done, 100 * total, per=100))
            del made, picture, scaled, latents, batch  # no work of the next batch beside them


def _pictures(jobs: list[Job], outcomes: Outcomes) -> "Iterator[tuple[Job, int, Tensor]]":
    """Each picture's number in its job and latents `[1, channels, height, width]`; without those
    of jobs whose outcome is known by then.
    """
    for job in jobs:
        latents: tuple[Tensor, ...] = ()
        with outcomes.of(job.index), untracked():
            latents = artifacts.read(Path(job.task.latents), "latents")[1]["latents"].split(1)
        for index, each in enumerate(latents):
            if outcomes.is_open(job.index):
                yield job, index, each


def _save(job: Job, index: int, picture: "Tensor", settings: dict[str, Any], model: Model) -> None:
    """Write one picture `[3, height, width]` with its record.

    Raises:
        NonFiniteError, StorageError: it is not written.
    """
    if not picture.isfinite().all():
        way_out = f"lowvram decode {job.task.latents} --dtype fp32"
        if settings["dtype"] == "float32":
            way_out = "check the files of the VAE"
        raise NonFiniteError(
            f"the VAE gave NaN or infinity in {settings['dtype']} for picture {index}: "
            f"{way_out} (the latents are kept)"
        )
    record = {
        **job.header.items[index],
        "model": model.public_record(),
        job.header.settings.get("stage", "denoise"): job.header.settings,
        "made_from": job.header.key,
        "decode": settings,
    }
    width, height = job.header.settings["requested"]
    resize = cut if model.get_family().margins else fit
    levels = to_levels(resize(picture[None].float(), width, height))[0]
    png.save(job.paths[index], levels, record)
