"""Denoise: embeddings to latents, with the transformer alone on the device.

`sample` is the loop and nothing else. Noise is drawn in float32 on the CPU, with one generator
for each picture: a seed draws the same noise on every device, in every dtype and batch.
"""

import hashlib
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts
from lowvram.component import use
from lowvram.devices import choose_device, choose_dtype, dtype_name
from lowvram.errors import ModelError, NonFiniteError, RequestError, first_line, translated
from lowvram.families.family import Family, Size
from lowvram.memory.meter import Meter
from lowvram.progress import OnProgress, Progress, ignore
from lowvram.repository import Model
from lowvram.request import DenoiseTask
from lowvram.stages.result import StageResult, in_batches, report_stage
from lowvram.weights.checkpoint import find_class
from lowvram.weights.whole import Whole

if TYPE_CHECKING:
    import torch
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
    make_scheduler = _scheduler_maker(task, model)
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
                model.get_family(),
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
    """What one picture starts from: its text, its noise, and a generator for noise to come."""

    positive: "dict[str, Tensor]"
    negative: "dict[str, Tensor]"  # empty without guidance
    noise: "Tensor"  # [1, channels, height, width]
    generator: "torch.Generator"


def _denoise_all(
    task: DenoiseTask,
    family: Family,
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

        finished += _denoise_batch(task, family, transformer, scheduler, batch, on_step).split(1)
    return torch.cat(finished)


def _denoise_batch(
    task: DenoiseTask,
    family: Family,
    transformer: "nn.Module",
    scheduler: Any,
    batch: Sequence[_Start],
    on_step: "Callable[[int, Tensor, Tensor], None]",
) -> "Tensor":
    """Latents of one batch, on the host."""
    import torch

    first = next(transformer.parameters())
    conditions = {
        name: _placed(tensor, first)
        for name, tensor in family.conditions(
            [start.positive for start in batch],
            [start.negative for start in batch if start.negative],
        ).items()
    }

    def predict(scaled: "Tensor", timestep: "Tensor") -> "Tensor":
        return family.predict(transformer, scaled, timestep, conditions, task.guidance_scale)

    noise = torch.cat([start.noise for start in batch]).to(first)
    options = _step_options(scheduler, task.eta, [start.generator for start in batch])
    latents = sample(predict, scheduler, noise, options, on_step).cpu()
    if not latents.isfinite().all():
        raise NonFiniteError(
            f"the transformer gave NaN or infinity in {first.dtype}: denoise with --dtype fp32"
        )
    return latents


def _every(steps: int, callback: Callback | None) -> Callback | None:
    """The callback, called for the steps that diffusers calls it for."""
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
    import torch

    configs = {role: model.config(role) for role in ("transformer", "vae")}
    shape = model.get_family().latent_shape(configs, Size(*task.rendered))
    given = _read_latents(task, (len(items), *shape)) if task.latents else None
    starts = []
    for index, item in enumerate(items):
        owner, generator = item["prompt_index"], torch.Generator("cpu").manual_seed(item["seed"])
        starts.append(
            _Start(
                positive=_text_tensors(embeds, owner, ""),
                negative=_text_tensors(embeds, owner, "negative_")
                if task.guidance_scale > 1
                else {},
                noise=torch.randn((1, *shape), generator=generator)
                if given is None
                else given[index : index + 1],
                generator=generator,
            )
        )
    return starts


def _text_tensors(embeds: "dict[str, Tensor]", index: int, prefix: str) -> "dict[str, Tensor]":
    """The tensors of one text, without the prefix that they have in the artifact."""
    start = f"{index}.{prefix}"
    return {
        name.removeprefix(start): tensor
        for name, tensor in embeds.items()
        if name.startswith(f"{start}prompt_")
    }


def _read_latents(task: DenoiseTask, shape: tuple[int, ...]) -> "Tensor":
    from safetensors.torch import load_file

    try:
        latents = load_file(task.latents)["latents"].float()
    except Exception as error:
        raise RequestError(
            f"starting latents {task.latents} cannot be read ({first_line(error)[:100]}): "
            "give a safetensors file with a tensor named latents"
        ) from None
    if tuple(latents.shape) != shape:
        raise RequestError(
            f"starting latents {task.latents} have shape {list(latents.shape)}, but "
            f"{list(shape)} are needed for {shape[0]} pictures of this size"
        )
    return latents


def _scheduler_maker(task: DenoiseTask, model: Model) -> "Callable[[torch.device | str], Any]":
    """Makes fresh schedulers of the model's own kind, after a trial that the request fits it."""
    config = dict(model.config("scheduler"))
    name = str(config.get("_class_name") or "")
    try:
        scheduler_class = find_class(f"diffusers.{name}")
        if not hasattr(scheduler_class, "set_timesteps"):
            raise AttributeError(name)
    except AttributeError:
        raise ModelError(f"the model's scheduler {name!r} is not one of diffusers'") from None

    def make(device: "torch.device | str") -> Any:
        scheduler = scheduler_class.from_config(config)
        _set_timesteps(scheduler, task, device)
        return scheduler

    if task.eta and "eta" not in inspect.signature(make("cpu").step).parameters:
        raise RequestError(f"--eta {task.eta} has no effect with {name}: leave it out")
    return make


def _set_timesteps(scheduler: Any, task: DenoiseTask, device: "torch.device | str") -> None:
    """As asked: by timesteps, by sigmas, or by their number."""
    takes = inspect.signature(scheduler.set_timesteps).parameters
    name = type(scheduler).__name__
    for option, values in (("timesteps", task.timesteps), ("sigmas", task.sigmas)):
        if values and option not in takes:
            raise RequestError(f"{name} takes no explicit {option}: use --steps")
    try:
        if task.timesteps:
            scheduler.set_timesteps(timesteps=list(task.timesteps), device=device)
        elif task.sigmas:
            scheduler.set_timesteps(sigmas=list(task.sigmas), device=device)
        else:
            scheduler.set_timesteps(task.steps, device=device)
    except (ValueError, IndexError) as error:
        raise RequestError(f"{name} refuses these steps: {first_line(error)}") from None


def _step_options(
    scheduler: Any, eta: float, generators: "list[torch.Generator]"
) -> dict[str, Any]:
    """Of eta and the generators, what this scheduler's `step` takes."""
    takes = inspect.signature(scheduler.step).parameters
    options = {"eta": eta, "generator": generators}
    return {name: value for name, value in options.items() if name in takes}


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
