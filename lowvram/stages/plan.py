"""What each stage of a run would do and take: from configurations alone, before anything is loaded.

Texts are not tokenised here: a token is at least a byte, so that a text has no more tokens than
bytes, and one for its end.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lowvram.devices import choose_device, choose_dtype, dtype_name
from lowvram.errors import RequestError
from lowvram.families.family import Size
from lowvram.memory.budget import find_room
from lowvram.memory.plan import Choice, Option, Room, choose
from lowvram.memory.predict import trace
from lowvram.memory.rates import Rates
from lowvram.repository import Model
from lowvram.request.denoise import DenoiseTask
from lowvram.request.encode import EncodeTask
from lowvram.request.encode_image import EncodeImageTask
from lowvram.request.tasks import AnyTask, Tasks, alike
from lowvram.stages.decision import rates_of
from lowvram.stages.given import read_given
from lowvram.stages.groups import computed_alike
from lowvram.stages.options.component import shapes
from lowvram.stages.options.encoder import Texts, encode_once, encoder_options
from lowvram.stages.options.pixels import pixels_options
from lowvram.stages.options.transformer import Steps, transformer_options
from lowvram.stages.result import OnOutcome, Outcomes
from lowvram.stages.schedule import scheduler_maker
from lowvram.stages.starts import begin, latent_shape

# RSS of a stage before it loads anything, libraries imported: 0.37 to 0.55 GB on Linux here.
_INTERPRETER_BYTES = 500_000_000


@dataclass(frozen=True)
class Row:
    """One way of one stage.

    Attributes:
        way: strategy with its details.
        fits: whether the room holds it.
        reason: of the one that was chosen; "" for others.
        predicted: by the names of the report.
    """

    stage: str
    way: str
    dtype: str
    fits: bool
    reason: str
    predicted: dict[str, Any]


@dataclass(frozen=True)
class _Stage:
    """What has to be known of a stage to list its ways."""

    name: str
    dtype: torch.dtype
    room: Room
    asked: str
    options: Iterable[Option[Any]]


@dataclass(frozen=True)
class _Target:
    """What stages are planned for.

    Attributes:
        every: list every way of a stage, not only those that were asked for.
    """

    device: torch.device
    rates: Rates
    every: bool

    def stage(
        self,
        name: str,
        role: str,
        task: AnyTask,
        asked: str,
        ways: Callable[[Model, str, torch.dtype, torch.device, Room], Iterable[Option[Any]]],
    ) -> _Stage:
        """A stage that computes with the component of that role."""
        dtype = self.dtype(role, task)
        room = find_room(self.device, task.vram, task.stage_budget, self.rates)
        model = Model.from_record(task.model)
        options = ways(model, "all" if self.every else asked, dtype, self.device, room)
        return _Stage(name, dtype, room, asked, options)

    def dtype(self, role: str, task: AnyTask) -> torch.dtype:
        """That the component of a role computes in."""
        model = Model.from_record(task.model)
        upcast = role == "vae" and model.vae_upcasts
        default = model.get_family().component(role).dtype
        return choose_dtype(task.dtype, default, self.device, upcast)[0]


def plan(tasks: Tasks, device: torch.device, every: bool = False) -> list[Row]:
    """The way that each stage would take.

    Args:
        device: to plan for; need not be there.
        every: list the others too.

    Raises:
        RequestError: a stage cannot keep within its budget, and not every way is wanted.
    """
    rates, rows = rates_of(device), []
    for stage in _stages(tasks, _Target(device, rates, every)):
        options = list(stage.options) if every else stage.options
        choice: Choice[Any] | None = None
        considered = (each for each in options if each.is_allowed(stage.asked))
        try:
            choice = choose(stage.name, considered, stage.room, 0, "")
        except RequestError:
            if not every:
                raise
        name = dtype_name(stage.dtype)
        chosen = None if choice is None else choice.option
        for option in options if every or chosen is None else [chosen]:
            rows.append(
                Row(
                    stage.name,
                    str(option),
                    name,
                    stage.room.holds(option.need),
                    choice.reason if choice and option is chosen else "",
                    option.need.foretold(stage.room, rates, name, _INTERPRETER_BYTES),
                )
            )
    return rows


def plan_refining(tasks: Tasks, device: torch.device, every: bool = False) -> list[Row]:
    """The same of a refiner's stages, named so."""
    rows = plan(tasks, device, every)
    return [replace(row, stage=f"refine: {row.stage}") for row in rows]


def check_budgets(rows: Sequence[Mapping[str, Any]], on_outcome: OnOutcome) -> None:
    """Find out which rows cannot keep within their budget.

    Args:
        rows: the tasks of a row by stage. Those alike in size and settings are planned once; one
            whose embeddings were given, with these.
        on_outcome: told of each that cannot, with a `RequestError` that names the smallest budget
            that would do.
    """
    outcomes = Outcomes(len(rows), on_outcome)
    alike_rows: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        key = computed_alike(row["denoise"]) + alike(row["decode"], "latents", "output")
        key += row["encode"].embeds
        if "encode-image" in row:
            key += alike(row["encode-image"], "images", "output", "sample_seeds")
        alike_rows.setdefault(key, []).append(index)
    encoded = [row["encode"] for row in rows if not row["encode"].embeds]
    at_once = _at_once(encoded) if encoded else None
    for group in alike_rows.values():
        row = rows[group[0]]
        encode = row["encode"] if row["encode"].embeds or at_once is None else at_once
        seeds = tuple(seed for index in group for seed in rows[index]["denoise"].seeds)
        denoise = replace(row["denoise"], seeds=seeds)
        device, image = choose_device(encode.device), row.get("encode-image")
        try:
            plan(Tasks(encode, denoise, row["decode"], image), device)
        except RequestError as error:
            for index in group:
                outcomes.settle(index, RequestError(str(error)))


def _at_once(tasks: Sequence[EncodeTask]) -> EncodeTask:
    """One task with the texts of all, each once, and the most tokens that any allows."""
    texts = dict.fromkeys(
        text for task in tasks for text in (*task.prompts, *task.negative_prompts)
    )
    return replace(
        tasks[0],
        prompts=tuple(texts),
        negative_prompts=tuple(texts),
        padding="max" if any(task.padding == "max" for task in tasks) else "none",
        max_tokens=max(task.max_tokens for task in tasks),
    )


def device_to_plan_for(name: str, vram: int) -> torch.device:
    """A device by name. With "auto" and a budget, where there is no accelerator, a CUDA card that
    is not here; "cuda" may always be planned for.

    Raises:
        DeviceError: no such device here, and it is no CUDA target.
    """
    if re.fullmatch(r"cuda(:\d+)?", name):
        return torch.device(name)
    device = choose_device(name)
    return torch.device("cuda") if name == "auto" and device.type == "cpu" and vram else device


def _stages(tasks: Tasks, target: _Target) -> Iterable[_Stage]:
    """Each is listed when the one before has found its way: what is refused, is by the first."""
    if tasks.image is not None:
        yield _encode_image(tasks.image, target)
    if not tasks.encode.embeds:  # for which nothing is loaded
        yield _encode(tasks.encode, target)
    yield _denoise(tasks, target)
    yield _decode(tasks, target)


def _encode_image(task: EncodeImageTask, target: _Target) -> _Stage:
    shape = (1, *latent_shape(task, Model.from_record(task.model)))
    ways = partial(pixels_options, shape=shape, batches=len(task.images), direction="encode")
    return target.stage("encode-image", "vae", task, task.encode, ways)


def _encode(task: EncodeTask, target: _Target) -> _Stage:
    ways = partial(encoder_options, texts=_texts(task))
    return target.stage("encode", "text_encoder", task, task.weights, ways)


def _denoise(tasks: Tasks, target: _Target) -> _Stage:
    task = tasks.denoise
    model = Model.from_record(task.model)
    beside, _ = model.get_family().picture_conditions(Size(*task.rendered), task.aesthetic_scores)
    number = len(begin(task, scheduler_maker(task, model)("cpu")))
    count, batches = _batches(task.batch_size, task)
    steps = Steps(
        (count, *latent_shape(task, model)),
        _encoded(tasks.encode, target) | beside,
        task.guidance_scale > 1,
        number * batches,
    )
    ways = partial(transformer_options, steps=steps)
    return target.stage("denoise", "transformer", task, task.weights, ways)


def _decode(tasks: Tasks, target: _Target) -> _Stage:
    task, model = tasks.decode, Model.from_record(tasks.decode.model)
    count, batches = _batches(task.batch_size, tasks.denoise)
    shape = (count, *latent_shape(tasks.denoise, model))
    ways = partial(pixels_options, shape=shape, batches=batches)
    return target.stage("decode", "vae", task, task.decode, ways)


def _batches(at_once: int, task: DenoiseTask) -> tuple[int, int]:
    """The pictures of the largest batch, and how many batches there are."""
    count = min(at_once, len(task.seeds))
    return count, -(-len(task.seeds) // count)


def _texts(task: EncodeTask) -> Texts:
    texts = {*task.prompts, *task.negative_prompts}
    tokens = max(len(text.encode()) + 1 for text in texts)
    return Texts(
        len(texts), task.max_tokens if task.padding == "max" else min(tokens, task.max_tokens)
    )


def _encoded(task: EncodeTask, target: _Target) -> dict[str, torch.Tensor]:
    """The tensors of the longest text, `[tokens, …]`: as given, or of these shapes."""
    if task.embeds:
        made: Mapping[str, torch.Tensor] = read_given(task)
    else:
        model = Model.from_record(task.model)
        family = model.get_family()
        encoder = shapes(model, "text_encoder", target.dtype("text_encoder", task))
        once = encode_once(family, _texts(task).tokens)
        made = trace(encoder, once, family.component("text_encoder").blocks).result
    return {name: tensor[0] for name, tensor in made.items()}
