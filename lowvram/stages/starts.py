"""What each picture of a denoise task starts from: its texts, its seed, its noise; and for pictures
made of others the latents that noise is added to, and the timesteps that are left to do.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts
from lowvram.errors import RequestError, first_line
from lowvram.families.family import Size
from lowvram.repository import Model
from lowvram.request.denoise import DenoiseTask
from lowvram.request.encode_image import EncodeImageTask
from lowvram.request.start import steps_done
from lowvram.stages.interpolate import slerp
from lowvram.stages.schedule import number_of_steps

if TYPE_CHECKING:
    from torch import Generator, Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What one picture starts from."""

    positive: "dict[str, Tensor]"
    negative: "dict[str, Tensor]"  # empty without guidance
    seed: int
    noise: "Tensor | None"  # [1, channels, height, width]; None to draw it
    origin: "Tensor | None" = None  # latents of that shape that noise is added to; None for none
    sampled: int | None = None  # the seed with which that was drawn from the VAE's posterior
    towards: int | None = None  # a second seed
    at: float = 0.0  # between the two seeds

    def texts(self) -> "list[dict[str, Tensor]]":
        """Its texts."""
        return [self.positive, self.negative] if self.negative else [self.positive]


def items_of(task: DenoiseTask, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The record of each picture, prompt by prompt."""
    if len(task.seeds) != len(prompts) * task.images_per_prompt:
        raise RequestError(
            f"{len(task.seeds)} seeds for {len(prompts) * task.images_per_prompt} pictures"
        )
    if task.guidance_scale <= 1 and any(prompt["negative_prompt"].strip() for prompt in prompts):
        log.warning(
            "the negative prompt has no effect: guidance %g turns guidance off",
            task.guidance_scale,
        )
    owners = [index for index in range(len(prompts)) for _ in range(task.images_per_prompt)]
    places = [{"towards": task.towards, "at": each} for each in task.at] or [{}] * len(owners)
    return [
        {
            "prompt": prompts[owner]["prompt"],
            "negative_prompt": prompts[owner]["negative_prompt"],
            "prompt_index": owner,
            "seed": seed,
            **place,
        }
        for owner, seed, place in zip(owners, task.seeds, places, strict=True)
    ]


def starts_of(
    task: DenoiseTask, model: Model, items: list[dict[str, Any]], embeds: "dict[str, Tensor]"
) -> list[Start]:
    """What each picture starts from. Given latents stand in for drawn noise."""
    given = read_latents(task, (len(items), *latent_shape(task, model)))
    beside = model.get_family().picture_conditions(Size(*task.rendered), task.aesthetic_scores)
    origins = _read_start(task, (len(items), *latent_shape(task, model)))
    if given is not None:
        log.info("noise from %s: seeds count only for noise that steps add", task.latents)
    sampled = _sampled_seeds(task, len(items))
    return [
        Start(
            positive=_text_tensors(embeds, item["prompt_index"], "") | beside[0],
            negative=_text_tensors(embeds, item["prompt_index"], "negative_") | beside[1]
            if task.guidance_scale > 1
            else {},
            seed=item["seed"],
            noise=None if given is None else given[index : index + 1],
            origin=None if origins is None else origins[index : index + 1],
            sampled=sampled[index],
            towards=item.get("towards"),
            at=item.get("at", 0.0),
        )
        for index, item in enumerate(items)
    ]


def latent_shape(task: DenoiseTask | EncodeImageTask, model: Model) -> tuple[int, int, int]:
    """Channels, height and width of the latents of one picture."""
    configs = {role: model.config(role) for role in ("transformer", "vae")}
    return model.get_family().latent_shape(configs, Size(*task.rendered))


def _text_tensors(embeds: "dict[str, Tensor]", index: int, prefix: str) -> "dict[str, Tensor]":
    """The tensors of one text, without the prefix that they have in the artifact."""
    return {name: embeds[key] for name, key in text_keys(embeds, index, prefix).items()}


def text_keys(found: Iterable[str], index: int, prefix: str) -> dict[str, str]:
    """The names that the tensors of one text have in the artifact, by those without prefix.

    Args:
        found: all names in it.

    Raises:
        RequestError: embeddings that were given have no negative ones.
    """
    before = f"{index}."
    own = {name.removeprefix(before) for name in found if name.startswith(before)}
    negative = {name for name in own if name.startswith("negative_")}
    wanted = negative if prefix else own - negative
    if not wanted:
        raise RequestError(
            "the embeddings were given without negative ones, which guidance needs: "
            "use --guidance 1, or give them too"
        )
    return {name.removeprefix(prefix): f"{before}{name}" for name in sorted(wanted)}


def read_latents(task: DenoiseTask, shape: tuple[int, ...]) -> "Tensor | None":
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
            f"starting latents {task.latents} are finished ones, not noise: lowvram decode them, "
            "or start from them with --start"
        )
    if tuple(latents.shape) != shape:
        raise RequestError(
            f"starting latents {task.latents} have shape {list(latents.shape)}, but "
            f"{list(shape)} are needed for {shape[0]} pictures of this size"
        )
    if not latents.isfinite().all():
        raise RequestError(f"starting latents {task.latents} hold NaN or infinity: make them again")
    return latents


def begin(task: DenoiseTask, scheduler: Any) -> "Tensor":
    """The timesteps that are to be done; from a start on, the last part of them.

    As `get_timesteps` of diffusers' img2img pipelines: of a scheduler of second order a step has
    two timesteps, and the scheduler is told where it begins.

    Args:
        scheduler: with its timesteps set.

    Raises:
        RequestError: no step would be left.
    """
    timesteps: Tensor = scheduler.timesteps
    if not task.start:
        return timesteps
    steps = number_of_steps(task, scheduler)
    done = steps_done(steps, task.strength)
    if done < 1:
        raise RequestError(f"--strength {task.strength:g} of {steps} steps is less than one step")
    first = (steps - done) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return timesteps[first:]


def first_latents(
    batch: Sequence[Start],
    generators: "Sequence[Generator]",
    shape: tuple[int, ...],
    scheduler: Any,
    timesteps: "Tensor",
) -> "Tensor":
    """What the loop begins with, `[pictures, channels, height, width]`, float32 on the CPU: noise,
    or a picture with noise; not multiplied by anything yet.

    Args:
        generators: one for each picture; they have drawn nothing yet.
        shape: `[1, channels, height, width]` of one picture.
        timesteps: as `begin` gave them.
    """
    import torch

    noise = torch.cat(
        [
            _drawn(start, generator, shape) if start.noise is None else start.noise
            for start, generator in zip(batch, generators, strict=True)
        ]
    )
    origins = [start.origin for start in batch if start.origin is not None]
    if not origins:
        return noise
    first = timesteps[:1].cpu().repeat(len(batch))
    noised: Tensor = scheduler.add_noise(torch.cat(origins), noise, first)
    return noised


def generators_of(batch: Sequence[Start]) -> "list[Generator]":
    """One for each picture: for its noise, and for what steps draw besides. Between two seeds that
    of the nearer one.
    """
    import torch

    nearer = [
        start.seed if start.towards is None or start.at < 0.5 else start.towards for start in batch
    ]
    return [torch.Generator("cpu").manual_seed(seed) for seed in nearer]


def _drawn(start: Start, generator: "Generator", shape: tuple[int, ...]) -> "Tensor":
    """A picture's noise; between two seeds on the great circle through both of theirs.

    A generator that has drawn the picture's place in the VAE's posterior goes on from there, as
    that of diffusers' img2img pipelines does: else the same numbers would come twice.
    """
    import torch

    if start.sampled == generator.initial_seed():
        torch.randn(shape, generator=generator)
    drawn = torch.randn(shape, generator=generator)
    if start.towards is None:
        return drawn
    first_is_nearer = start.at < 0.5
    farther = torch.Generator("cpu").manual_seed(start.towards if first_is_nearer else start.seed)
    other = torch.randn(shape, generator=farther)
    ends = (drawn, other) if first_is_nearer else (other, drawn)
    return slerp(*ends, start.at)


def _read_start(task: DenoiseTask, shape: tuple[int, ...]) -> "Tensor | None":
    """The latents that each picture starts from, in fp32; None without a start.

    Raises:
        ArtifactError: the file is damaged. RequestError: it is not what it was.
    """
    if not task.start:
        return None
    _, tensors = artifacts.read(Path(task.start), "latents")
    latents: Tensor = tensors["latents"].float()
    if 0 <= task.start_picture < len(latents):
        latents = latents[task.start_picture : task.start_picture + 1].expand(shape[0], -1, -1, -1)
    if tuple(latents.shape) != shape:
        raise RequestError(
            f"{task.start} has latents of shape {list(latents.shape)}, but {list(shape)} are "
            "needed: encode the picture again"
        )
    return latents


def _sampled_seeds(task: DenoiseTask, pictures: int) -> "list[int | None]":
    """For each picture the seed with which its start was drawn from the VAE's posterior."""
    header = artifacts.read_header(Path(task.start), "latents") if task.start else None
    if header is None or not header.settings.get("sampled"):
        return [None] * pictures
    seeds: list[int | None] = [item["seed"] for item in header.items]
    return seeds if task.start_picture < 0 else [seeds[task.start_picture]] * pictures


def start_settings(task: DenoiseTask) -> dict[str, Any]:
    """What the header says of a start: the key of its file; nothing without one."""
    if not task.start:
        return {}
    return {
        "start": artifacts.read_header(Path(task.start), "latents").key,
        "start_picture": task.start_picture,
        "strength": task.strength,
    }
