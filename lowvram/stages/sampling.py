"""The loop from noise to latents, with a transformer on loan.

`sample` is the loop and nothing else. Noise is drawn in float32 on the CPU, with one generator
for each picture: a seed draws the same noise on every device, in every dtype and batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lowvram.devices import dtype_name
from lowvram.errors import NonFiniteError
from lowvram.families.family import Family
from lowvram.memory.budget import untracked
from lowvram.progress import OnProgress, Progress
from lowvram.request.denoise import DenoiseTask
from lowvram.stages.checkpoints import Checkpoints, Keeper, Point
from lowvram.stages.groups import Group, Job, Picture
from lowvram.stages.previews import Previews
from lowvram.stages.result import Outcomes, in_batches
from lowvram.stages.savings import Savings, chunk_feed_forward, guided, real_tokens
from lowvram.stages.schedule import step_options
from lowvram.stages.starts import Start, begin, first_latents, generators_of
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
    stepped: "Callable[[tuple[Tensor, ...]], Tensor]",
    first: int = 0,
) -> "Tensor":
    """From noise to latents.

    Args:
        predict: scaled latents and timestep to the model's prediction.
        scheduler: with its timesteps set.
        latents: `[pictures, channels, height, width]`, as the scheduler has them at the first; or
            as they were after `first` steps.
        timesteps: to be done.
        step_options: what this scheduler's `step` takes besides (eta, generator).
        on_step: called after each with its index, timestep and latents.
        stepped: the new latents among what the scheduler's step gave.

    Returns:
        `[pictures, channels, height, width]`.
    """
    for index, timestep in enumerate(timesteps[first:], first):
        prediction = predict(scheduler.scale_model_input(latents, timestep), timestep)
        outputs = scheduler.step(prediction, timestep, latents, **step_options, return_dict=False)
        latents = stepped(outputs)
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
    checkpoints_of: Callable[[Job], Checkpoints],
    previews_of: Callable[[DenoiseTask], Previews | None],
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
        maker = group.make_scheduler
        checkpoints = checkpoints_of(group.jobs[0])  # of a group of one, or none
        point = _resumed(group.jobs[0], checkpoints)
        before += len(group.jobs[0].finished) * group.steps
        previews = previews_of(group.task)
        for batch in in_batches(group.pictures(outcomes), group.task.batch_size):
            scheduler = maker(network.device)

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
            keeper = Keeper(
                checkpoints,
                partial(maker, network.device),
                batch[0].job.in_order(),
                group.task.batch_size,
                len(batch[0].job.items),
                group.steps,
                point,
            )
            latents = _denoise_batch(group, network, scheduler, starts, on_step, keeper, previews)
            point = None
            before += len(batch) * group.steps
            for picture, made in zip(batch, latents.split(1), strict=True):
                with outcomes.of(picture.job.index), untracked():
                    _keep(picture, made, network)
                    if len(picture.job.finished) == len(picture.job.items):
                        on_job(picture.job)
                        picture.job.finished.clear()


def _resumed(job: Job, checkpoints: Checkpoints) -> Point | None:
    """Where the job was stopped, if it was; what was finished by then is put back."""
    with untracked():
        point = checkpoints.find()
        for number, latents in enumerate(() if point is None else point.finished):
            job.finished[number] = latents[None]
    return point


def _keep(picture: Picture, latents: "Tensor", network: Network) -> None:
    if not latents.isfinite().all():
        name = dtype_name(network.dtype)
        exact = name == "float32"
        way_out = "try another --guidance or --scheduler" if exact else "denoise with --dtype fp32"
        raise NonFiniteError(f"the transformer gave NaN or infinity in {name}: {way_out}")
    # Not a view: it would keep the whole batch for one picture of it.
    picture.job.finished[picture.number] = latents.clone()


def _denoise_batch(
    group: Group,
    network: Network,
    scheduler: Any,
    batch: Sequence[Start],
    on_step: "Callable[[int, Tensor, Tensor], None]",
    keeper: Keeper,
    previews: Previews | None,
) -> "Tensor":
    """Latents of one batch, on the host."""
    shape, family = (1, *group.shape), group.model.get_family()
    task = group.task
    predict = network.predictor(family, batch, task.guidance_scale)
    if previews is not None:
        predict = previews.watching(predict)
    generators = generators_of(batch)
    options = step_options(scheduler, task.eta, generators)
    timesteps = begin(task, scheduler)
    start = first_latents(batch, generators, shape, scheduler, timesteps)
    start = start.to(network.device, network.dtype)
    if not task.start:
        start = start * scheduler.init_noise_sigma
    start, first = keeper.start(start, scheduler, generators)

    def stepped(index: int, timestep: "Tensor", latents: "Tensor") -> None:
        if previews is not None:
            previews.show(index, timestep, latents, scheduler, len(timesteps))
        on_step(index, timestep, latents)
        with untracked():
            keeper.keep(index + 1, latents, scheduler, generators)

    return sample(
        predict,
        scheduler,
        start,
        timesteps,
        options,
        stepped,
        lambda outputs: family.stepped(outputs, group.make_scheduler.steps),
        first,
    ).cpu()


def every(steps: int, callback: Callback | None) -> Callback | None:
    """The callback, called for every `steps`th step only. Of a second-order step, the whole."""
    if callback is None:
        return None
    return lambda step, timestep, latents: (
        callback(step, timestep, latents) if step % steps == 0 else None
    )
