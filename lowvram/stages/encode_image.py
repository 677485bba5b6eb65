"""Encode-image: pictures to latents, with the VAE alone on the device.

What is written is what denoise starts from, in the place of its own finished latents: scaled as the
transformer works on them, so that decode gives the picture back.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts
from lowvram.component import use
from lowvram.devices import choose_device, choose_dtype, dtype_name
from lowvram.errors import NonFiniteError, RequestError, translated
from lowvram.memory.budget import untracked
from lowvram.memory.meter import Meter
from lowvram.pixels.fit import widen
from lowvram.pixels.picture import pixels_of, read_picture
from lowvram.pixels.strategy import OnWork, Pixels
from lowvram.progress import OnProgress, Progress, ignore, within
from lowvram.repository import Model
from lowvram.request.encode_image import EncodeImageTask
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
from lowvram.stages.starts import latent_shape
from lowvram.weights.whole import Whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowvram.stages.decision import Decision

STAGE = "encode-image"
_OR_STRIPS = ", or --encode strips"

log = logging.getLogger(__name__)


def encode_image(task: EncodeImageTask, on_progress: OnProgress = ignore) -> StageResult:
    """Write the latents of every picture to `task.output`.

    Raises:
        RequestError: a picture cannot be read.
        ModelError, DeviceError, MemoryExhaustedError, StorageError: as their names say.
        NonFiniteError: the VAE computed NaN or infinity; nothing is written.
    """
    return encode_image_each([task], on_progress).only()


@translated(STAGE)
def encode_image_each(
    tasks: Sequence[EncodeImageTask],
    on_progress: OnProgress = ignore,
    on_outcome: OnOutcome = unheard,
) -> StageResults:
    """Write the latents of every task, with the VAE loaded once.

    Args:
        tasks: of one model, and alike in all but images, sizes, seeds and output.
        on_outcome: told of each task as soon as its file is written, or what went wrong with it.

    Raises:
        ModelError, DeviceError, MemoryExhaustedError: what concerns all tasks that are left.
    """
    from lowvram.stages.options.pixels import DECODER_HALF  # imports torch

    task, model = tasks[0], Model.from_record(tasks[0].model)
    outcomes = Outcomes(len(tasks), on_outcome)
    component = model.get_family().component("vae")
    device = choose_device(task.device, warns=True)
    dtype, dtype_reason = choose_dtype(task.dtype, component.dtype, device, model.vae_upcasts)
    with Meter(device) as meter:
        decision = _decide(tasks, model, device, dtype, outcomes)
        if decision is None:
            return StageResults(outcomes.in_order(), None)
        pixels = decision.strategy
        reasons = [
            f"encode {pixels.name}: {decision.reason}",
            f"{dtype_name(dtype)}: {dtype_reason}",
        ]
        log.info("encode-image on %s, %s", device, "; ".join(reasons))
        on_progress(Progress(STAGE, "loading the VAE"))
        settings = {"dtype": dtype_name(dtype), "device": device.type, **pixels.settings()}
        used = use(
            component.class_name,
            model.fetch("vae"),
            Whole(dtype, without=DECODER_HALF),
            device,
            meter,
            decision.room,
            lambda loaded: _encode_each(
                tasks, model, loaded.model, pixels, device, settings, outcomes, on_progress, meter
            ),
        )
    report = report_stage(
        meter,
        STAGE,
        pixels.name,
        dtype_name(dtype),
        reasons,
        used,
        {
            "model": model.public_record()["name"],
            **shared_settings([_settings(each, settings) for each in tasks]),
        },
        decision,
    )
    return StageResults(outcomes.in_order(), report)


def _decide(
    tasks: Sequence[EncodeImageTask],
    model: Model,
    device: "torch.device",
    dtype: "torch.dtype",
    outcomes: Outcomes,
) -> "Decision[Pixels] | None":
    """One way of encoding for all tasks; those of the largest pictures may be given up for it."""
    from lowvram.stages.decision import decide, decide_for_all
    from lowvram.stages.options.pixels import pixels_options  # imports torch

    def pixels_of_task(index: int) -> int:
        return prod(tasks[index].rendered)

    def decide_for(left: Sequence[int]) -> "Decision[Pixels]":
        task = tasks[max(left, key=pixels_of_task)]
        return decide(
            STAGE,
            task,
            device,
            dtype_name(dtype),
            partial(
                pixels_options,
                model,
                task.encode,
                dtype,
                device,
                shape=(1, *latent_shape(task, model)),
                batches=sum(len(tasks[index].images) for index in left),
                folder=Path(task.output).parent,
                direction="encode",
            ),
            _OR_STRIPS if task.encode == "whole" else "",
        )

    def largest_of(left: Sequence[int]) -> list[int]:
        most = max(map(pixels_of_task, left))
        return [index for index in left if pixels_of_task(index) == most]

    return decide_for_all(outcomes.open(), decide_for, largest_of, lambda index: [index], outcomes)


def _settings(task: EncodeImageTask, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting that changed a byte."""
    return {
        "stage": STAGE,
        "requested": list(task.requested),
        "rendered": list(task.rendered),
        "sampled": bool(task.sample_seeds),
        **shared,
    }


def _encode_each(
    tasks: Sequence[EncodeImageTask],
    model: Model,
    vae: "nn.Module",
    pixels: Pixels,
    device: "torch.device",
    settings: Mapping[str, Any],
    outcomes: Outcomes,
    on_progress: OnProgress,
    meter: Meter,
) -> None:
    """Task by task; each one's file is on disk before the next begins."""
    total, done = sum(len(task.images) for task in tasks), 0

    def on_picture() -> None:
        nonlocal done
        done += 1
        meter.mark(f"picture {done}")
        on_progress(Progress(STAGE, "encoding", 100 * done, 100 * total, per=100))

    for index in outcomes.open():
        task = tasks[index]
        with outcomes.of(index):
            latents, items = _encode_all(
                task,
                model,
                vae,
                pixels,
                device,
                lambda number: within(on_progress, STAGE, "encoding", number, 1, total),
                on_picture,
                done,
            )
            header = artifacts.Header(
                kind="latents",
                model=task.model,
                settings=_settings(task, settings),
                items=items,
            )
            with untracked():
                artifacts.write(Path(task.output), header, {"latents": latents})
            outcomes.settle(index, Made([Path(task.output)], sized(items, task.requested)))


def _encode_all(
    task: EncodeImageTask,
    model: Model,
    vae: "nn.Module",
    pixels: Pixels,
    device: "torch.device",
    work_of: Callable[[int], OnWork],
    on_picture: Callable[[], None],
    before: int,
) -> "tuple[Tensor, list[dict[str, Any]]]":
    """Latents of a task's pictures, float32 on the host, and their records; one by one.

    Args:
        work_of: the progress inside of a picture, by its number.
        before: pictures that are done.
    """
    import torch

    family, config = model.get_family(), model.config("vae")
    if family.margins and task.requested != task.rendered:
        log.info("%dx%d px, encoded with its edges repeated to %dx%d: %s needs multiples of 8",
                 *task.requested, *task.rendered, family.name)  # fmt: skip
    dtype = next(vae.parameters()).dtype
    made: list[Tensor] = []
    items: list[dict[str, Any]] = []
    for index, name in enumerate(task.images):
        data = _bytes_of(Path(name))
        picture = read_picture(Path(name), data)
        shown = pixels_of(picture, task.requested if family.margins else task.rendered, dtype)
        shown = widen(shown, *task.rendered)
        parameters = pixels.encode(vae, shown, device, work_of(before + index)).float()
        seed = task.sample_seeds[index] if task.sample_seeds else None
        latents = family.scale(posterior(parameters, seed), config)
        if not latents.isfinite().all():
            raise NonFiniteError(
                f"the VAE gave NaN or infinity in {dtype} for {name}: encode with --dtype fp32"
            )
        made.append(latents)
        items.append(_record(data, picture.size, seed))
        on_picture()
    return torch.cat(made), items


def posterior(parameters: "Tensor", seed: int | None) -> "Tensor":
    """Latents `[1, channels, height, width]` from what the VAE says of a picture.

    Args:
        parameters: `[1, 2 x channels, height, width]`, means and log variances.
        seed: to draw with, on the CPU; None for the mode, which is the means.
    """
    import torch
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    said = DiagonalGaussianDistribution(parameters)
    if seed is None:
        return said.mode()
    return said.sample(torch.Generator("cpu").manual_seed(seed))


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(
            f"picture {path} cannot be read ({error.strerror}): check the path"
        ) from None


def _record(data: bytes, size: tuple[int, int], sample_seed: int | None) -> dict[str, Any]:
    """What the file says of a picture; the fields of a denoised one are there, and empty."""
    return {
        "prompt": "",
        "negative_prompt": "",
        "seed": sample_seed,
        "picture_sha256": hashlib.sha256(data).hexdigest(),
        "picture_size": list(size),
    }
