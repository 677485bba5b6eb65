"""Denoise: embeddings to latents, with the transformer alone on the device.

`sample` is the loop and nothing else. Noise is drawn in float32 on the CPU, with one generator
for each picture: a seed draws the same noise on every device, in every dtype and batch.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts, prepared
from lowvram.component import use
from lowvram.devices import choose_device, choose_dtype, dtype_name
from lowvram.errors import NonFiniteError, RequestError, first_line, translated
from lowvram.families.family import Family, Size
from lowvram.memory.meter import Meter
from lowvram.progress import OnProgress, Progress, ignore
from lowvram.repository import Model
from lowvram.request.denoise import DenoiseTask
from lowvram.stages.result import StageResult, in_batches, report_stage
from lowvram.stages.savings import Savings, chunk_feed_forward, guided, real_tokens
from lowvram.stages.schedule import scheduler_maker, step_options
from lowvram.weights.checkpoint import Loaded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_OR_STREAM = ", or --weights stream (run: --transformer-weights stream)"

log = logging.getLogger(__name__)

# step (from 0), timestep, latents [pictures, channels, height, width]: as diffusers calls it
Callback = Callable[[int, int, "Tensor"], None]


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
    items = _items(task, embeds_header.items)
    make_scheduler = scheduler_maker(task, model)
    make_scheduler("cpu")  # refuses what it cannot do, before anything is loaded
    starts = _starts(task, model, items, embeds)
    with Meter(device) as meter:
        batches = -(-len(starts) // task.batch_size)
        steps = Steps(
            (min(task.batch_size, len(starts)), *_latent_shape(task, model)),
            max((text for start in starts for text in start.texts()), key=_tokens),
            task.guidance_scale > 1,
            batches * len(make_scheduler("cpu").timesteps),
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
            lambda loaded: _denoise_all(
                task,
                model,
                _Network(loaded, device, dtype, placed.savings),
                lambda: make_scheduler(device),
                starts,
                on_progress,
                _every(callback_steps, callback),
                meter.mark,
            ),
        )
        header = artifacts.Header(
            kind="latents",
            model=task.model,
            settings=_settings(task, dtype_name(dtype), device.type, make_scheduler(device))
            | {"weights": placed.weights.name, **placed.savings.settings()},
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

    def texts(self) -> "list[dict[str, Tensor]]":
        """Its texts."""
        return [self.positive, self.negative] if self.negative else [self.positive]


@dataclass(frozen=True)
class _Network:
    """The transformer on loan, and how it is used."""

    loaded: Loaded
    device: "torch.device"
    dtype: "torch.dtype"
    savings: Savings

    def placed(self, tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """On the device; numbers in the dtype, masks in their own."""
        return {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in tensors.items()
        }

    def predictor(
        self, family: Family, batch: "Sequence[_Start]", guidance_scale: float
    ) -> "Callable[[Tensor, Tensor], Tensor]":
        """Scaled latents and timestep to the prediction for a batch, guidance applied."""
        model = self.loaded.model
        trim = real_tokens if self.savings.text == "real" else dict
        positive = [trim(start.positive) for start in batch]
        negative = [trim(start.negative) for start in batch if start.negative]
        if not negative or self.savings.branches == "together":
            conditions = self.placed(family.conditions(positive, negative))
            return lambda scaled, timestep: family.predict(
                model, scaled, timestep, conditions, guidance_scale
            )
        branches = [self.placed(family.conditions(texts, [])) for texts in (negative, positive)]
        return lambda scaled, timestep: guided(
            lambda branch: family.predict(model, scaled, timestep, branches[branch], 1.0),
            lambda calls: self.loaded.each(calls, lambda done, total: None),
            guidance_scale,
        )


def _denoise_all(
    task: DenoiseTask,
    model: Model,
    network: _Network,
    make_scheduler: Callable[[], Any],
    starts: list[_Start],
    on_progress: OnProgress,
    callback: Callback | None,
    on_mark: Callable[[str], None],
) -> "Tensor":
    """Latents of all pictures, on the host."""
    import torch

    chunk_feed_forward(network.loaded.model, network.savings.feed_forward_chunks)
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
            on_mark(f"step {done}")
            on_progress(Progress("denoise", "denoising", done, total))
            if callback is not None and (index == steps - 1 or (index + 1) % order == 0):
                callback(index // order, int(timestep), latents)

        finished += _denoise_batch(task, model, network, scheduler, batch, on_step).split(1)
    return torch.cat(finished)


def _denoise_batch(
    task: DenoiseTask,
    model: Model,
    network: _Network,
    scheduler: Any,
    batch: Sequence[_Start],
    on_step: "Callable[[int, Tensor, Tensor], None]",
) -> "Tensor":
    """Latents of one batch, on the host."""
    import torch

    shape = (1, *_latent_shape(task, model))
    predict = network.predictor(model.get_family(), batch, task.guidance_scale)
    generators = [torch.Generator("cpu").manual_seed(start.seed) for start in batch]
    noise = [
        torch.randn(shape, generator=generator) if start.noise is None else start.noise
        for start, generator in zip(batch, generators, strict=True)
    ]
    options = step_options(scheduler, task.eta, generators)
    start = torch.cat(noise).to(network.device, network.dtype)
    latents = sample(predict, scheduler, start, options, on_step).cpu()
    if not latents.isfinite().all():
        raise NonFiniteError(
            f"the transformer gave NaN or infinity in {network.dtype}: denoise with --dtype fp32"
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
        "eta": task.eta,
        "requested": list(task.requested),
        "rendered": list(task.rendered),
        "starting_latents": _file_sha256(task.latents),
        "scheduler": type(scheduler).__name__,
        "dtype": dtype,
        "device": device,
        "batch_size": task.batch_size,
    }
