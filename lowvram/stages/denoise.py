"""Denoise: embeddings to latents, with the transformer alone on the device."""

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts, prepared
from lowvram.component import use
from lowvram.devices import choose_device, choose_dtype, dtype_name
from lowvram.errors import RequestError, translated
from lowvram.memory.meter import Meter
from lowvram.progress import OnProgress, Progress, ignore
from lowvram.repository import Model
from lowvram.request.denoise import DenoiseTask
from lowvram.stages.result import StageResult, report_stage
from lowvram.stages.sampling import Callback, Network, denoise_all, every
from lowvram.stages.schedule import scheduler_maker
from lowvram.stages.starts import (
    begin,
    items_of,
    latent_shape,
    read_latents,
    start_settings,
    starts_of,
)

if TYPE_CHECKING:
    from torch import Tensor

_OR_STREAM = ", or --weights stream (run: --transformer-weights stream)"

log = logging.getLogger(__name__)


@translated("denoise")
def denoise(
    task: DenoiseTask,
    on_progress: OnProgress = ignore,
    callback: Callback | None = None,
    callback_steps: int = 1,
) -> StageResult:
    """Write the latents of every picture to `task.output`.

    Args:
        callback: called with step, timestep and latents after every `callback_steps`th step.

    Raises:
        ArtifactError: the embeddings are damaged or of another kind.
        RequestError: the model's scheduler cannot do what was asked.
        ModelError, DeviceError, MemoryExhaustedError, StorageError: as their names say.
        NonFiniteError: the transformer computed NaN or infinity; nothing is written.
    """
    if callback_steps < 1:
        raise RequestError(f"callback_steps {callback_steps} is out of range: 1 or more")
    embeds_header, embeds = artifacts.read(Path(task.embeds), "embeds")
    from lowvram.stages.decision import decide
    from lowvram.stages.options.transformer import Steps, transformer_options  # imports torch

    model = Model.from_record(task.model)
    component = model.get_family().component("transformer")
    device = choose_device(task.device)
    dtype, dtype_reason = choose_dtype(task.dtype, component.dtype, device)
    items = items_of(task, embeds_header.items)
    make_scheduler = scheduler_maker(task, model)
    timesteps = begin(task, make_scheduler("cpu"))  # refuses what it cannot, before any load
    starts = starts_of(task, model, items, embeds)
    with Meter(device) as meter:
        batches = -(-len(starts) // task.batch_size)
        steps = Steps(
            (min(task.batch_size, len(starts)), *latent_shape(task, model)),
            max((text for start in starts for text in start.texts()), key=_tokens),
            task.guidance_scale > 1,
            batches * len(timesteps),
        )
        decision = decide(
            "denoise",
            task,
            device,
            dtype_name(dtype),
            lambda room: transformer_options(model, task.weights, dtype, device, room, steps),
            _OR_STREAM if task.weights == "whole" else "",
        )
        placed = decision.strategy
        folder, note = prepared.fetch(model, "transformer", "whole", dtype_name(dtype))
        reasons = [
            f"weights {placed.weights.name}: {decision.reason}",
            f"{dtype_name(dtype)}: {dtype_reason}",
            *([note] if note else []),
        ]
        log.info("denoise on %s, %s", device, "; ".join(reasons))
        on_progress(Progress("denoise", "loading the transformer"))
        used = use(
            component.class_name,
            folder,
            placed.weights,
            device,
            meter,
            decision.room,
            lambda loaded: denoise_all(
                task,
                model,
                Network(loaded, device, dtype, placed.savings),
                lambda: make_scheduler(device),
                starts,
                on_progress,
                every(callback_steps, callback),
                meter.mark,
            ),
        )
        header = artifacts.Header(
            kind="latents",
            model=task.model,
            settings=_settings(task, dtype_name(dtype), device.type, make_scheduler(device))
            | {"weights": placed.weights.name, **placed.savings.settings()}
            | start_settings(task),
            items=items,
            made_from=embeds_header.key,
        )
        artifacts.write(Path(task.output), header, {"latents": used.result})
    report = report_stage(
        meter,
        "denoise",
        placed.weights.name,
        dtype_name(dtype),
        reasons,
        used,
        {"model": model.public_record()["name"], **header.settings},
        budget_bytes=decision.room.bytes if decision.room.option else None,
        predicted=decision.predicted,
    )
    width, height = task.requested
    made = [{**item, "width": width, "height": height} for item in items]
    return StageResult([Path(task.output)], made, report)


def check(task: DenoiseTask) -> None:
    """Find out before anything is loaded whether the model's scheduler can do the task.

    Raises:
        RequestError, ModelError: as `denoise` does.
    """
    model = Model.from_record(task.model)
    begin(task, scheduler_maker(task, model)("cpu"))
    read_latents(task, (len(task.seeds), *latent_shape(task, model)))


def _tokens(text: "dict[str, Tensor]") -> int:
    return max(len(tensor) for tensor in text.values())


def _file_sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def _settings(task: DenoiseTask, dtype: str, device: str, scheduler: Any) -> dict[str, Any]:
    """Every setting that changed a byte."""
    return {
        "steps": task.steps,
        "timesteps": list(task.timesteps),
        "sigmas": list(task.sigmas),
        "guidance_scale": task.guidance_scale,
        **({"aesthetic_scores": list(task.aesthetic_scores)} if task.aesthetic_scores else {}),
        "eta": task.eta,
        "requested": list(task.requested),
        "rendered": list(task.rendered),
        "starting_latents": _file_sha256(task.latents),
        "scheduler": type(scheduler).__name__,
        "dtype": dtype,
        "device": device,
        "batch_size": task.batch_size,
    }
