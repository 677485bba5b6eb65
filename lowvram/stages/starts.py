"""What each picture of a denoise task starts from: its texts, its seed, its noise."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowvram import artifacts
from lowvram.errors import RequestError, first_line
from lowvram.families.family import Size
from lowvram.repository import Model
from lowvram.request.denoise import DenoiseTask

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Start:
    """What one picture starts from."""

    positive: "dict[str, Tensor]"
    negative: "dict[str, Tensor]"  # empty without guidance
    seed: int
    noise: "Tensor | None"  # [1, channels, height, width]; None to draw it

    def texts(self) -> "list[dict[str, Tensor]]":
        """Its texts."""
        return [self.positive, self.negative] if self.negative else [self.positive]


def items_of(task: DenoiseTask, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
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


def starts_of(
    task: DenoiseTask, model: Model, items: list[dict[str, Any]], embeds: "dict[str, Tensor]"
) -> list[Start]:
    """What each picture starts from. Given latents stand in for drawn noise."""
    given = read_latents(task, (len(items), *latent_shape(task, model)))
    beside = model.get_family().picture_conditions(Size(*task.rendered), task.aesthetic_scores)
    return [
        Start(
            positive=_text_tensors(embeds, item["prompt_index"], "") | beside[0],
            negative=_text_tensors(embeds, item["prompt_index"], "negative_") | beside[1]
            if task.guidance_scale > 1
            else {},
            seed=item["seed"],
            noise=None if given is None else given[index : index + 1],
        )
        for index, item in enumerate(items)
    ]


def latent_shape(task: DenoiseTask, model: Model) -> tuple[int, int, int]:
    configs = {role: model.config(role) for role in ("transformer", "vae")}
    return model.get_family().latent_shape(configs, Size(*task.rendered))


def _text_tensors(embeds: "dict[str, Tensor]", index: int, prefix: str) -> "dict[str, Tensor]":
    """The tensors of one text, without the prefix that they have in the artifact."""
    own = {name.removeprefix(f"{index}."): tensor for name, tensor in embeds.items()
           if name.startswith(f"{index}.")}  # fmt: skip
    negative = {name for name in own if name.startswith("negative_")}
    wanted = negative if prefix else own.keys() - negative
    return {name.removeprefix(prefix): own[name] for name in sorted(wanted)}


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
            f"starting latents {task.latents} are finished ones, not noise: lowvram decode them"
        )
    if tuple(latents.shape) != shape:
        raise RequestError(
            f"starting latents {task.latents} have shape {list(latents.shape)}, but "
            f"{list(shape)} are needed for {shape[0]} pictures of this size"
        )
    return latents
