"""Decode: latents to pictures, with the VAE alone on the device."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts
from lowvram.component import use
from lowvram.devices import choose_device, choose_dtype, dtype_name
from lowvram.errors import NonFiniteError, translated
from lowvram.memory.meter import Meter
from lowvram.pixels import png
from lowvram.pixels.fit import cut, fit, to_levels
from lowvram.pixels.strategy import OnWork, Pixels
from lowvram.progress import OnProgress, Progress, ignore
from lowvram.repository import Model
from lowvram.request.decode import DecodeTask, picture_paths
from lowvram.stages.result import StageResult, in_batches, report_stage
from lowvram.weights.whole import Whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_OR_STRIPS = ", or --decode strips"

log = logging.getLogger(__name__)


@translated("decode")
def decode(task: DecodeTask, on_progress: OnProgress = ignore) -> StageResult:
    """Write every picture: `task.output`, or for several x-0.png, x-1.png, … beside it.

    Raises:
        ArtifactError: the latents are damaged or of another kind.
        ModelError, DeviceError, MemoryExhaustedError, StorageError: as their names say.
        NonFiniteError: the VAE computed NaN or infinity; that picture is not written.
    """
    from lowvram.stages.decision import decide
    from lowvram.stages.options.pixels import ENCODER_HALF, pixels_options  # imports torch

    header, tensors = artifacts.read(Path(task.latents), "latents")
    model = Model.from_record(task.model)
    component = model.get_family().component("vae")
    device = choose_device(task.device)
    upcast = bool(model.config("vae").get("force_upcast", True))  # diffusers' default
    dtype, dtype_reason = choose_dtype(task.dtype, component.dtype, device, upcast)
    first = tensors["latents"]
    shape = (min(task.batch_size, len(first)), *first.shape[1:])
    batches = -(-len(first) // shape[0])
    decision = decide(
        "decode",
        task,
        device,
        dtype_name(dtype),
        lambda room: pixels_options(
            model, task.decode, dtype, device, room, shape, batches, Path(task.output).parent
        ),
        _OR_STRIPS if task.decode in ("whole", "blended") else "",
    )
    pixels = decision.strategy
    reasons = [f"decode {pixels.name}: {decision.reason}", f"{dtype_name(dtype)}: {dtype_reason}"]
    log.info("decode on %s, %s", device, "; ".join(reasons))

    paths = picture_paths(Path(task.output), len(header.items))
    settings = {"dtype": dtype_name(dtype), "device": device.type}
    records = [
        {
            **item,
            "model": model.public_record(),
            header.settings.get("stage", "denoise"): header.settings,
            "made_from": header.key,
        }
        | {"decode": {**settings, **pixels.settings(), "batch_size": task.batch_size}}
        for item in header.items
    ]
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
                task,
                model,
                loaded.model,
                pixels,
                device,
                tensors["latents"],
                header.settings["requested"],
                records,
                paths,
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
        {"model": model.public_record()["name"], **records[0]["decode"]},
        budget_bytes=decision.room.bytes if decision.room.option else None,
        predicted=decision.predicted,
    )
    width, height = header.settings["requested"]
    items = [{**item, "width": width, "height": height} for item in header.items]
    return StageResult(paths, items, report)


def _decode_all(
    task: DecodeTask,
    model: Model,
    vae: "nn.Module",
    pixels: Pixels,
    device: "torch.device",
    latents: "Tensor",
    requested: tuple[int, int],
    records: list[dict[str, Any]],
    paths: list[Path],
    on_progress: OnProgress,
    on_picture: Callable[[str], None],
) -> None:
    """Decode batch by batch; each picture is on disk before the next batch begins."""
    family, config = model.get_family(), model.config("vae")
    sized = cut if family.margins else fit
    dtype = next(vae.parameters()).dtype
    width, height = requested
    done = 0
    for batch in in_batches(range(len(paths)), task.batch_size):
        scaled = family.unscale(latents[batch[0] : batch[-1] + 1].to(dtype), config)
        on_work = _within(on_progress, done, len(batch), len(paths))
        made = pixels.decode(vae, scaled, device, on_work)
        for index, picture in zip(batch, made, strict=True):
            if not picture.isfinite().all():
                raise NonFiniteError(
                    f"the VAE gave NaN or infinity in {dtype} for picture {index}: "
                    f"lowvram decode {task.latents} --dtype fp32 (the latents are kept)"
                )
            levels = to_levels(sized(picture[None].float(), width, height))[0]
            png.save(paths[index], levels, records[index])
            done += 1
            on_picture(f"picture {done}")
            on_progress(Progress("decode", "decoding", 100 * done, 100 * len(paths)))
        del made, picture, scaled, levels  # or they would lie beside the next batch's work


def _within(on_progress: OnProgress, before: int, batch: int, pictures: int) -> OnWork:
    """Progress inside of a batch, in hundredths of a picture; whole pictures are told elsewhere."""

    def on_work(done: int, total: int) -> None:
        if done < total:
            hundredths = 100 * before + 100 * batch * done // total
            on_progress(Progress("decode", "decoding", hundredths, 100 * pictures))

    return on_work
