"""Denoise: embeddings to latents, with the transformer alone on the device.

`sample` is the loop and nothing else. Noise is drawn in float32 on the CPU, with one generator
for each picture: a seed draws the same noise on every device, in every dtype and batch.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts
from lowvram.component import use
from lowvram.devices import choose_device, choose_dtype, dtype_name
from lowvram.errors import NonFiniteError, RequestError, first_line, translated
from lowvram.families.family import Size
from lowvram.memory.meter import Meter
from lowvram.progress import OnProgress, Progress, ignore
from lowvram.repository import Model
from lowvram.request import DenoiseTask
from lowvram.stages.result import StageResult, in_batches, report_stage
from lowvram.stages.schedule import scheduler_maker, step_options
from lowvram.weights.whole import Whole

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

# step (from 0), timestep, latents [pictures, channels, height, width]: as diffusers calls it
Callback = Callable[[int, int, "Tensor"], None]


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
    model = Model.from_record(task.model)
    component = model.get_family().component("transformer")
    device = choose_device(task.device)
    dtype, dtype_reason = choose_dtype(task.dtype, component.dtype, device)
    reasons = ["weights whole: the only strategy so far", f"{dtype_name(dtype)}: {dtype_reason}"]
    log.info("denoise on %s, %s", device, "; ".join(reasons))

    items = _items(task, embeds_header.items)
    make_scheduler = scheduler_maker(task, model)
    make_scheduler("cpu")  # refuses what it cannot do, before anything is loaded
    starts = _starts(task, model, items, embeds)
    with translated("denoise"):
        meter = Meter(device)
        on_progress(Progress("denoise", "loading the transformer"))
        used = use(
            component.class_name,
            model.fetch("transformer"),
            Whole(dtype),
            device,
            meter,
            lambda transformer: _denoise_all(
                task,
                model,
                transformer,
                lambda: make_scheduler(device),
                starts,
                on_progress,
                _every(callback_steps, callback),
            ),
        )
        header = artifacts.Header(
            kind="latents",
            model=task.model,
            settings=_settings(task, dtype_name(dtype), device.type, make_scheduler(device)),
            items=items,
            made_from=embeds_header.key,
        )
        artifacts.write(Path(task.output), header, {"latents": used.result})
    report = report_stage(
        meter, "denoise", "whole", dtype_name(dtype), reasons, used.weights_bytes, used.left_behind
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
    scheduler_maker(task, model)("cpu")
    _read_latents(task, (len(task.seeds), *_latent_shape(task, model)))


def sample(
    predict: "Callable[[Tensor, Tensor], Tensor]",
    scheduler: Any,
    latents: "Tensor",
    step_options: dict[str, Any],
    on_step: Callable[[int, "Tensor", "Tensor"], None],
) -> "Tensor":
    """From noise to latents.

    Args:
        predict: scaled latents and timestep to the model's prediction.
        scheduler: with its timesteps set.
        latents: `[pictures, channels, height, width]`, standard normal.
        step_options: what this scheduler's `step` takes besides (eta, generator).
        on_step: called after each with its index, timestep and latents.

    Returns:
        `[pictures, channels, height, width]`.
    """
    latents = latents * scheduler.init_noise_sigma
    for index, timestep in enumerate(scheduler.timesteps):
        prediction = predict(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(prediction, timestep, latents, **step_options, return_dict=False)[
            0
        ]
        on_step(index, timestep, latents)
    return latents


@dataclass(frozen=True)
class _Start:
    """What one picture starts from."""

    positive: "dict[str, Tensor]"
    negative: "dict[str, Tensor]"  # empty without guidance
    seed: int
    noise: "Tensor | None"  # [1, channels, height, width]; None to draw it


def _denoise_all(
    task: DenoiseTask,
    model: Model,
    transformer: "nn.Module",
    make_scheduler: Callable[[], Any],
    starts: list[_Start],
    on_progress: OnProgress,
    callback: Callback | None,
) -> "Tensor":
    """Latents of all pictures, on the host."""
    import torch

    finished: list[Tensor] = []
    for batch in in_batches(starts, task.batch_size):
        scheduler = make_scheduler()
        steps = len(scheduler.timesteps)

        def on_step(
            index: int,
            timestep: "Tensor",
            latents: "Tensor",
            before: int = len(finished),
            steps: int = steps,
            order: int = scheduler.order,
        ) -> None:
            done, total = before * steps + index + 1, len(starts) * steps
            on_progress(Progress("denoise", "denoising", done, total))
            if callback is not None and (index == steps - 1 or (index + 1) % order == 0):
                callback(index // order, int(timestep), latents)

        finished += _denoise_batch(task, model, transformer, scheduler, batch, on_step).split(1)
    return torch.cat(finished)


def _denoise_batch(
    task: DenoiseTask,
    model: Model,
    transformer: "nn.Module",
    scheduler: Any,
    batch: Sequence[_Start],
    on_step: "Callable[[int, Tensor, Tensor], None]",
) -> "Tensor":
    """Latents of one batch, on the host."""
    import torch

    family, first = model.get_family(), next(transformer.parameters())
    shape = (1, *_latent_shape(task, model))
    conditions = {
        name: _placed(tensor, first)
        for name, tensor in family.conditions(
            [start.positive for start in batch],
            [start.negative for start in batch if start.negative],
        ).items()
    }

    def predict(scaled: "Tensor", timestep: "Tensor") -> "Tensor":
        return family.predict(transformer, scaled, timestep, conditions, task.guidance_scale)

    generators = [torch.Generator("cpu").manual_seed(start.seed) for start in batch]
    noise = [
        torch.randn(shape, generator=generator) if start.noise is None else start.noise
        for start, generator in zip(batch, generators, strict=True)
    ]
    options = step_options(scheduler, task.eta, generators)
    latents = sample(predict, scheduler, torch.cat(noise).to(first), options, on_step).cpu()
    if not latents.isfinite().all():
        raise NonFiniteError(
            f"the transformer gave NaN or infinity in {first.dtype}: denoise with --dtype fp32"
        )
    return latents


def _every(steps: int, callback: Callback | None) -> Callback | None:
    """The callback, called for every `steps`th step only. Of a second-order step, the whole."""
    if callback is None:
        return None
    return lambda step, timestep, latents: (
        callback(step, timestep, latents) if step % steps == 0 else None
    )


def _items(task: DenoiseTask, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The record of each picture, prompt by prompt."""
    if len(task.seeds) != len(prompts) * task.images_per_prompt:
        raise RequestError(
            f"{len(task.seeds)} seeds for {len(prompts) * task.images_per_prompt} pictures"
        )
    owners = [index for index in range(len(prompts)) for _ in range(task.images_per_prompt)]
    return [
        {
            "prompt": prompts[owner]["prompt"],
            "negative_prompt": prompts[owner]["negative_prompt"],
            "prompt_index": owner,
            "seed": seed,
        }
        for owner, seed in zip(owners, task.seeds, strict=True)
    ]


def _starts(
    task: DenoiseTask, model: Model, items: list[dict[str, Any]], embeds: "dict[str, Tensor]"
) -> list[_Start]:
    """What each picture starts from. Given latents stand in for drawn noise."""
    given = _read_latents(task, (len(items), *_latent_shape(task, model)))
    return [
        _Start(
            positive=_text_tensors(embeds, item["prompt_index"], ""),
            negative=_text_tensors(embeds, item["prompt_index"], "negative_")
            if task.guidance_scale > 1
            else {},
            seed=item["seed"],
            noise=None if given is None else given[index : index + 1],
        )
        for index, item in enumerate(items)
    ]


def _latent_shape(task: DenoiseTask, model: Model) -> tuple[int, int, int]:
    configs = {role: model.config(role) for role in ("transformer", "vae")}
    return model.get_family().latent_shape(configs, Size(*task.rendered))


def _text_tensors(embeds: "dict[str, Tensor]", index: int, prefix: str) -> "dict[str, Tensor]":
    """The tensors of one text, without the prefix that they have in the artifact."""
    names = ("prompt_embeds", "prompt_attention_mask")
    return {name: embeds[f"{index}.{prefix}{name}"] for name in names}


def _read_latents(task: DenoiseTask, shape: tuple[int, ...]) -> "Tensor | None":
    """The starting latents that the task names, in fp32; None where noise is to be drawn."""
    from safetensors import safe_open

    if not task.latents:
        return None
    try:
        with safe_open(task.latents, framework="pt") as file:
            ours = artifacts.METADATA_KEY in (file.metadata() or {})
            latents = file.get_tensor("latents").float()
    except Exception as error:
        raise RequestError(
            f"starting latents {task.latents} cannot be read ({first_line(error)[:100]}): "
            "give a safetensors file with a tensor named latents"
        ) from None
    if ours:
        raise RequestError(
            f"starting latents {task.latents} are finished ones, not noise: lowvram decode them"
        )
    if tuple(latents.shape) != shape:
        raise RequestError(
            f"starting latents {task.latents} have shape {list(latents.shape)}, but "
            f"{list(shape)} are needed for {shape[0]} pictures of this size"
        )
    return latents


def _placed(tensor: "Tensor", like: "Tensor") -> "Tensor":
    """On the device of `like`; numbers in its dtype, masks in their own."""
    return tensor.to(like) if tensor.is_floating_point() else tensor.to(like.device)


def _file_sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def _settings(task: DenoiseTask, dtype: str, device: str, scheduler: Any) -> dict[str, Any]:
    """Every setting that changed a byte."""
    return {
        "steps": task.steps,
        "timesteps": list(task.timesteps),
        "sigmas": list(task.sigmas),
        "guidance_scale": task.guidance_scale,
        "eta": task.eta,
        "requested": list(task.requested),
        "rendered": list(task.rendered),
        "starting_latents": _file_sha256(task.latents),
        "scheduler": type(scheduler).__name__,
        "weights": "whole",
        "dtype": dtype,
        "device": device,
        "batch_size": task.batch_size,
    }
