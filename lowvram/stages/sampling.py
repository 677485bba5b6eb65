"""The loop from noise to latents, with a transformer on loan.

`sample` is the loop and nothing else. Noise is drawn in float32 on the CPU, with one generator
for each picture: a seed draws the same noise on every device, in every dtype and batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowvram.errors import NonFiniteError
from lowvram.families.family import Family
from lowvram.memory.budget import untracked
from lowvram.progress import OnProgress, Progress
from lowvram.stages.groups import Group, Job, Picture
from lowvram.stages.result import Outcomes, in_batches
from lowvram.stages.savings import Savings, chunk_feed_forward, guided, real_tokens
from lowvram.stages.schedule import step_options
from lowvram.stages.starts import Start
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
    groups: Sequence[Group],
    network: Network,
    outcomes: Outcomes,
    on_progress: OnProgress,
    callback: Callback | None,
    on_mark: Callable[[str], None],
    on_job: Callable[[Job], None],
) -> None:
    """Latents of all pictures, group by group and batch by batch.

    Args:
        on_job: called with each job as soon as its last picture is finished.
    """
    chunk_feed_forward(network.loaded.model, network.savings.feed_forward_chunks)
    # Pictures times steps; the bar ends early where a job fails.
    total = sum(len(job.items) * group.steps for group in groups for job in group.jobs)
    before = 0
    for group in groups:
        for batch in in_batches(group.pictures(outcomes), group.task.batch_size):
            scheduler = group.make_scheduler(network.device)

            def on_step(
                index: int,
                timestep: "Tensor",
                latents: "Tensor",
                before: int = before,
                steps: int = group.steps,
                order: int = scheduler.order,
            ) -> None:
                done = before + index + 1
                on_mark(f"step {done}")
                on_progress(Progress("denoise", "denoising", done, total))
                if callback is not None and (index == steps - 1 or (index + 1) % order == 0):
                    callback(index // order, int(timestep), latents)

            starts = [picture.start for picture in batch]
            latents = _denoise_batch(group, network, scheduler, starts, on_step)
            before += len(batch) * group.steps
            for picture, made in zip(batch, latents.split(1), strict=True):
                with outcomes.of(picture.job.index), untracked():
                    _keep(picture, made, network)
                    if len(picture.job.finished) == len(picture.job.items):
                        on_job(picture.job)
                        picture.job.finished.clear()


def _keep(picture: Picture, latents: "Tensor", network: Network) -> None:
    if not latents.isfinite().all():
        raise NonFiniteError(
            f"the transformer gave NaN or infinity in {network.dtype}: denoise with --dtype fp32"
        )
    # Not a view: it would keep the whole batch for one picture of it.
    picture.job.finished[picture.number] = latents.clone()


def _denoise_batch(
    group: Group,
    network: Network,
    scheduler: Any,
    batch: Sequence[Start],
    on_step: "Callable[[int, Tensor, Tensor], None]",
) -> "Tensor":
    """Latents of one batch, on the host."""
    import torch

    shape = (1, *group.shape)
    predict = network.predictor(group.model.get_family(), batch, group.task.guidance_scale)
    generators = [torch.Generator("cpu").manual_seed(start.seed) for start in batch]
    noise = [
        torch.randn(shape, generator=generator) if start.noise is None else start.noise
        for start, generator in zip(batch, generators, strict=True)
    ]
    options = step_options(scheduler, group.task.eta, generators)
    start = torch.cat(noise).to(network.device, network.dtype)
    return sample(predict, scheduler, start, options, on_step).cpu()


def every(steps: int, callback: Callback | None) -> Callback | None:
    """The callback, called for every `steps`th step only. Of a second-order step, the whole."""
    if callback is None:
        return None
    return lambda step, timestep, latents: (
        callback(step, timestep, latents) if step % steps == 0 else None
    )
