"""What was asked of the encode stage."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from lowvram import emphasis
from lowvram.errors import RequestError
from lowvram.families.family import Family
from lowvram.repository import Model
from lowvram.request.checks import artifact, budget, in_range, is_unicode, one_of

WEIGHTS = ("auto", "whole", "8bit", "4bit", "stream")
DTYPES = ("auto", "fp32", "bf16", "fp16")
PADDINGS = ("none", "max")


@dataclass(frozen=True)
class EncodeTask:
    """Everything the encode stage needs. See `resolve_encode`."""

    model: dict[str, Any]
    output: str
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    weights: str
    dtype: str
    device: str
    clean_caption: bool
    padding: str
    max_tokens: int
    weighting: bool
    cache: bool
    vram: int  # bytes that the process may take on the device; 0 for what is free
    stage_budget: int  # bytes that tensors may take there, which counts instead; 0 for none
    steps_down: int  # ways of working that have run out of memory already
    embeds: str = ""  # a file of embeddings to take instead of encoding; "" for none


class EncodeOptions(TypedDict, total=False):
    """What may be asked for; see `resolve_encode`."""

    negative_prompt: str | Sequence[str]
    weights: str
    dtype: str
    device: str
    clean_caption: bool | None
    padding: str | None
    max_tokens: int | None
    weighting: bool
    cache: bool
    vram: int | None
    stage_budget: int | None
    embeds: str | Path | None


def resolve_encode(
    prompts: str | Sequence[str],
    model: Model,
    output: str | Path,
    *,
    negative_prompt: str | Sequence[str] = "",
    weights: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    clean_caption: bool | None = None,
    padding: str | None = None,
    max_tokens: int | None = None,
    weighting: bool = False,
    cache: bool = True,
    vram: int | None = None,
    stage_budget: int | None = None,
    embeds: str | Path | None = None,
) -> EncodeTask:
    """Check what was asked of the encode stage.

    Args:
        prompts: one or many; each must say something.
        negative_prompt: one for all, or one for each.
        weights: how the text encoder's weights sit; "auto" takes whole where it fits, else
            stream.
        clean_caption: clean the text as the model's training captions were; None where they were.
        padding: "none" encodes real tokens only; "max" pads as the diffusers pipeline does; None
            for the first of these that the model can be given.
        max_tokens: at which text is cut; None for the family's limit.
        weighting: read (word:1.3) and the like as weights; see emphasis.py. False takes brackets as
            they stand.
        cache: take embeddings of texts that were encoded before, and keep those that are not.
        vram: bytes that the process may take on the device; None for what is free.
        stage_budget: bytes that tensors may take there, which counts instead; None for none.
        embeds: a safetensors file with `prompt_embeds` `[prompts, tokens, channels]` and
            `prompt_attention_mask` `[prompts, tokens]`, and `negative_…` of both, to take instead
            of encoding; the prompts are its labels then.

    Raises:
        RequestError: names the value and the way out.
    """
    texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not texts or any(not text.strip() for text in texts):
        raise RequestError("the prompt is empty: say what the picture shall show")
    component = model.get_family().component("text_encoder")
    if dtype == component.overflows_in:
        raise RequestError(f"the text encoder overflows in {dtype}: use --dtype bf16 or fp32")
    negative = (
        (negative_prompt,) * len(texts)
        if isinstance(negative_prompt, str)
        else tuple(negative_prompt)
    )
    if len(negative) != len(texts):
        raise RequestError(
            f"{len(negative)} negative prompts for {len(texts)} prompts: give one, or as many"
        )
    if any(not is_unicode(text) for text in (*texts, *negative)):
        raise RequestError("the prompt is not valid text: check the terminal's encoding")
    for text in (*texts, *negative) if weighting else ():
        emphasis.parse(text)  # refuses weights that are out of range
    if embeds is not None:
        idle = {
            "--negative": any(negative),
            "--weights (run: --encoder-weights)": weights != "auto",
            "--no-clean": clean_caption is not None,
            "--padding": padding is not None,
            "--max-tokens": max_tokens is not None,
            "--weighting": weighting,
            "--text-encoder": "text_encoder" in model.swapped,
        }
        _check_given(embeds, model, [option for option, is_set in idle.items() if is_set])
    family = model.get_family()
    if clean_caption and not family.cleans_captions:
        raise RequestError(f"--clean has no meaning for {family.name}: leave it out")
    if padding in PADDINGS and padding not in family.paddings:
        raise RequestError(
            f"--padding {padding} is not for {family.name}, which attends to the padding too: "
            "leave it out"
        )
    limit = family.max_tokens
    return EncodeTask(
        model=model.record(),
        output=artifact(output, embeds),
        prompts=texts,
        negative_prompts=negative,
        weights=one_of("--weights", weights, WEIGHTS),
        dtype=one_of("--dtype", dtype, DTYPES),
        device=device,
        clean_caption=family.cleans_captions if clean_caption is None else clean_caption,
        padding=one_of("--padding", padding or family.paddings[0], PADDINGS),
        max_tokens=in_range("--max-tokens", limit if max_tokens is None else max_tokens, 2, limit),
        weighting=weighting,
        cache=cache,
        vram=budget("--vram", vram),
        stage_budget=budget("--stage-budget", stage_budget),
        steps_down=0,
        embeds="" if embeds is None else str(embeds),
    )


def _check_given(embeds: str | Path, model: Model, idle: list[str]) -> None:
    """Refuse options that say how to encode where nothing is encoded, and models of other texts."""
    family = model.get_family()
    if family.text_tensors != Family.text_tensors:
        raise RequestError(
            f"--embeds is not for {family.name}, whose texts are "
            f"{' and '.join(family.text_tensors)}: leave it out"
        )
    if idle:
        raise RequestError(f"{idle[0]} has no effect with --embeds: leave one of them out")
    if not os.path.isfile(embeds):
        raise RequestError(f"--embeds {embeds} does not exist: check its name")
