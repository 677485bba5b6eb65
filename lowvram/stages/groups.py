"""Denoise tasks as jobs, and jobs that are alike as groups whose pictures may share batches.

Embeddings are read when a job's turn comes, and dropped with it: a list of a thousand prompts
would hold gigabytes of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts
from lowvram.families.family import Size
from lowvram.memory.budget import untracked
from lowvram.repository import Model
from lowvram.request.denoise import DenoiseTask
from lowvram.request.tasks import alike
from lowvram.stages.result import Outcomes
from lowvram.stages.schedule import SchedulerMaker, scheduler_maker
from lowvram.stages.starts import (
    Start,
    begin,
    items_of,
    latent_shape,
    read_latents,
    starts_of,
    text_keys,
)

if TYPE_CHECKING:
    from torch import Tensor

    from lowvram.stages.options.transformer import Steps

# Of a denoise task, what belongs to its own pictures and does not say how they are computed.
_PICTURES_OWN = (
    "embeds",
    "output",
    "seeds",
    "images_per_prompt",
    "latents",
    "start",
    "start_picture",
    "towards",
    "at",
)


def computed_alike(task: DenoiseTask) -> str:
    """A text that is equal for tasks whose pictures may share batches: with starts, or without.

    A checkpoint and a preview are of one task alone.
    """
    alone = task.output if task.checkpoint_every or task.preview else ""
    return f"{alike(task, *_PICTURES_OWN)} {bool(task.start)} {alone}"


@dataclass
class Job:
    """One task, and its pictures so far.

    Attributes:
        index: of the task in the stage's list.
        header: of its embeddings.
        items: the record of each picture.
        finished: latents `[1, channels, height, width]` on the host, by picture.
    """

    index: int
    task: DenoiseTask
    header: artifacts.Header
    items: list[dict[str, Any]]
    finished: "dict[int, Tensor]" = field(default_factory=dict)

    def in_order(self) -> "list[Tensor]":
        """The finished ones."""
        return [self.finished[number] for number in sorted(self.finished)]


@dataclass(frozen=True)
class Picture:
    """One picture of a job."""

    job: Job
    number: int
    start: Start


@dataclass(frozen=True)
class Group:
    """Jobs that are computed alike: in steps, guidance, size and whatever else a task says.

    Attributes:
        task: one of theirs, for what they have in common.
        shape: of the latents of a picture, `[channels, height, width]`.
        make_scheduler: a fresh one, its timesteps set, for a device.
        steps: of the scheduler.
    """

    task: DenoiseTask
    model: Model
    shape: tuple[int, int, int]
    make_scheduler: SchedulerMaker
    steps: int
    jobs: list[Job]

    @property
    def batches(self) -> int:
        """How many there are when nothing fails."""
        return -(-sum(len(job.items) for job in self.jobs) // self.task.batch_size)

    @property
    def pictures_at_once(self) -> int:
        """In the largest batch."""
        return min(self.task.batch_size, sum(len(job.items) for job in self.jobs))

    def pictures(self, outcomes: Outcomes) -> Iterator[Picture]:
        """Job by job, without those whose outcome is known by then."""
        for job in self.jobs:
            starts: list[Start] = []
            with outcomes.of(job.index), untracked():
                _, embeds = artifacts.read(Path(job.task.embeds), "embeds")
                starts = starts_of(job.task, self.model, job.items, embeds)
                del embeds
            for number, start in enumerate(starts):
                if outcomes.is_open(job.index) and number not in job.finished:
                    yield Picture(job, number, start)


def grouped(tasks: Sequence[DenoiseTask], model: Model, outcomes: Outcomes) -> list[Group]:
    """The tasks that can be done, in groups by first appearance; what is wrong with the others is
    their outcome.
    """
    groups: dict[str, Group] = {}
    for index, task in enumerate(tasks):
        with outcomes.of(index):
            header = artifacts.verify(Path(task.embeds), "embeds")
            job = Job(index, task, header, items_of(task, header.items))
            key = computed_alike(task)
            if key not in groups:
                make = scheduler_maker(task, model)  # refuses what it cannot do
                shape = latent_shape(task, model)
                groups[key] = Group(task, model, shape, make, len(begin(task, make("cpu"))), [])
            read_latents(task, (len(job.items), *groups[key].shape))
            list(_texts(job))  # refuses what is not there
            groups[key].jobs.append(job)
    return [group for group in groups.values() if group.jobs]


def most_demanding(groups: Sequence[Group]) -> "Steps":
    """What all groups need at most: the largest batch, the longest text, guidance if any has it."""
    from lowvram.stages.options.transformer import Steps  # imports torch

    shapes = [(group.pictures_at_once, *group.shape) for group in groups]
    texts = [text for group in groups for job in group.jobs for text in _texts(job)]
    return Steps(
        max(shapes, key=prod),
        max(texts, key=lambda text: max(len(tensor) for tensor in text.values())),
        any(group.task.guidance_scale > 1 for group in groups),
        sum(group.batches * group.steps for group in groups),
    )


def _texts(job: Job) -> "Iterator[dict[str, Tensor]]":
    """Tensors without storage, of the shapes that the job's texts have."""
    import torch

    family = Model.from_record(job.task.model).get_family()
    beside, _ = family.picture_conditions(Size(*job.task.rendered), job.task.aesthetic_scores)
    prefixes = ("", "negative_") if job.task.guidance_scale > 1 else ("",)
    for index in range(len(job.header.items)):
        for prefix in prefixes:
            keys = text_keys(job.header.tensors, index, prefix)
            described = {name: job.header.tensors[key] for name, key in keys.items()}
            yield {
                name: torch.empty(each["shape"], dtype=getattr(torch, each["dtype"]), device="meta")
                for name, each in described.items()
            } | beside
