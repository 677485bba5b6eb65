"""The loop from noise to latents, with a transformer on loan.

`sample` is the loop and nothing else. Noise is drawn in float32 on the CPU, with one generator
for each picture: a seed draws the same noise on every device, in every dtype and batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowvram.errors import NonFiniteError
from lowvram.families.family import Family
from lowvram.progress import OnProgress, Progress
from lowvram.repository import Model
from lowvram.request.denoise import DenoiseTask
from lowvram.stages.result import in_batches
from lowvram.stages.savings import Savings, chunk_feed_forward, guided, real_tokens
from lowvram.stages.schedule import step_options
from lowvram.stages.starts import Start, begin, first_latents, generators_of, latent_shape
from lowvram.weights.checkpoint import Loaded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# step (from 0), timestep, latents [pictures, channels, height, width]: as diffusers calls it
Callback = Callable[[int, int, "Tensor"], None]


def sample(
    predict: "Callable[[Tensor, Tensor], Tensor]",
    scheduler: Any,
    latents: "Tensor",
    timesteps: "Tensor",
    step_options: dict[str, Any],
    on_step: Callable[[int, "Tensor", "Tensor"], None],
) -> "Tensor":
    """From noise to latents.

    Args:
        predict: scaled latents and timestep to the model's prediction.
        scheduler: with its timesteps set.
        latents: `[pictures, channels, height, width]`, as the scheduler has them at the first.
        timesteps: to be done.
        step_options: what this scheduler's `step` takes besides (eta, generator).
        on_step: called after each with its index, timestep and latents.

    Returns:
        `[pictures, channels, height, width]`.
    """
    for index, timestep in enumerate(timesteps):
        prediction = predict(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(prediction, timestep, latents, **step_options, return_dict=False)[
            0
        ]
        on_step(index, timestep, latents)
    return latents


@dataclass(frozen=True)
class Network:
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
        self, family: Family, batch: "Sequence[Start]", guidance_scale: float
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


def denoise_all(
    task: DenoiseTask,
    model: Model,
    network: Network,
    make_scheduler: Callable[[], Any],
    starts: list[Start],
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
        steps = len(begin(task, scheduler))

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
    network: Network,
    scheduler: Any,
    batch: Sequence[Start],
    on_step: "Callable[[int, Tensor, Tensor], None]",
) -> "Tensor":
    """Latents of one batch, on the host."""
    shape = (1, *latent_shape(task, model))
    predict = network.predictor(model.get_family(), batch, task.guidance_scale)
    generators = generators_of(batch)
    options = step_options(scheduler, task.eta, generators)
    timesteps = begin(task, scheduler)
    start = first_latents(batch, generators, shape, scheduler, timesteps)
    start = start.to(network.device, network.dtype)
    if not task.start:
        start = start * scheduler.init_noise_sigma
    latents = sample(predict, scheduler, start, timesteps, options, on_step).cpu()
    if not latents.isfinite().all():
        raise NonFiniteError(
            f"the transformer gave NaN or infinity in {network.dtype}: denoise with --dtype fp32"
        )
    return latents


def every(steps: int, callback: Callback | None) -> Callback | None:
    """The callback, called for every `steps`th step only. Of a second-order step, the whole."""
    if callback is None:
        return None
    return lambda step, timestep, latents: (
        callback(step, timestep, latents) if step % steps == 0 else None
    )
