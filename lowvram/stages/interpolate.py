"""Interpolate: what lies between two texts, or between the noises of two seeds.

Texts have different numbers of tokens. Padding the shorter one would be a jump: a picture pays
attention to what is padded, and of zeros it is led astray by up to 0.6 of the distance between two
texts. So both are stretched to one length, each token repeated as often as any other: where the
repetitions are equal, cross-attention (which knows no positions) gives exactly what it gave before.
Then token by token along a straight line.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts
from lowvram.errors import RequestError
from lowvram.repository import Model
from lowvram.request.between import check_places
from lowvram.request.checks import artifact

if TYPE_CHECKING:
    from torch import Tensor

STAGE = "interpolate"
_PARTS = ("", "negative_")


def interpolate(
    one: str | Path,
    other: str | Path,
    *,
    output: str | Path,
    at: Sequence[float] | None = None,
) -> artifacts.Header:
    """Write embeddings that lie between those of two files: prompt by prompt, place by place.

    Args:
        one, other: what encode wrote, for the same text encoder and of as many prompts.
        output: x.embeds.safetensors.
        at: 0 for the one, bit for bit, to 1 for the other; None for five places.

    Returns:
        the header of what was written.

    Raises:
        ArtifactError: a file is damaged or of another kind.
        RequestError: the two do not go together.
    """
    places, path = check_places(at), artifact(output, one, other)
    first, start = artifacts.read(Path(one), "embeds")
    second, end = artifacts.read(Path(other), "embeds")
    limit = _check_pair(first, second, start, end, f"{one} and {other}")
    items: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for index, (item, last) in enumerate(zip(first.items, second.items, strict=True)):
        for place in places:
            number = len(items)
            for part in _PARTS:
                texts = [_text(each, index, part) for each in (start, end)]
                embeds, mask = between(texts[0], texts[1], place, limit)
                tensors[f"{number}.{part}prompt_embeds"] = embeds
                tensors[f"{number}.{part}prompt_attention_mask"] = mask
            items.append(_item(item, last, place, tensors, number))
    header = artifacts.Header(
        kind="embeds",
        model=first.model,
        settings={
            "stage": STAGE,
            "at": list(places),
            "towards": second.key,
            "dtype": str(next(iter(start.values())).dtype).removeprefix("torch."),
        },
        items=items,
        made_from=first.key,
    )
    return artifacts.write(Path(path), header, tensors)


def between(
    one: "tuple[Tensor, Tensor]", other: "tuple[Tensor, Tensor]", at: float, limit: int
) -> "tuple[Tensor, Tensor]":
    """What lies between two texts; at 0 and 1 these themselves.

    Args:
        one, other: embeddings `[tokens, channels]` and mask `[tokens]`.
        limit: how many tokens there may be, where one of the texts has no more.

    Returns:
        the same, in their dtype; all tokens count.
    """
    import torch

    if at in (0, 1):
        embeds, mask = one if at == 0 else other
        return embeds.clone(), mask.clone()
    start, end = (embeds[mask.bool()].float() for embeds, mask in (one, other))
    tokens = _common_length(len(start), len(end), limit)
    mixed = torch.lerp(_stretched(start, tokens), _stretched(end, tokens), at)
    return mixed.to(one[0].dtype), torch.ones(tokens, dtype=one[1].dtype)


def slerp(one: "Tensor", other: "Tensor", at: float) -> "Tensor":
    """Spherical interpolation (Shoemake 1985): along the great circle, at even speed.

    Between two draws of standard normal noise it is again standard normal noise, which a straight
    line is not: half-way its variance would be half.

    Args:
        one, other: of one shape, float32.
        at: 0 for the one, bit for bit, to 1 for the other.
    """
    import torch

    start, end = one.double(), other.double()
    cosine = (start * end).sum() / (start.norm() * end.norm())
    angle = cosine.clamp(-1, 1).acos()
    if angle.sin() < 1e-6:  # the same, or opposite: there is no single circle
        return torch.lerp(start, end, at).to(one.dtype)
    between = ((1 - at) * angle).sin() * start + (at * angle).sin() * end
    return (between / angle.sin()).to(one.dtype)


def _common_length(one: int, other: int, limit: int) -> int:
    """A multiple of both, so that the tokens of each are repeated equally often; where there is
    none within the limit, the largest one of the longer.
    """
    common = math.lcm(one, other)
    longer = max(one, other)
    return common if common <= limit else max(longer, limit // longer * longer)


def _stretched(text: "Tensor", tokens: int) -> "Tensor":
    """`[tokens, channels]`: each token repeated, in order, as evenly as can be."""
    import torch

    return text[torch.arange(tokens) * len(text) // tokens]


def _text(tensors: "dict[str, Tensor]", index: int, part: str) -> "tuple[Tensor, Tensor]":
    return (
        tensors[f"{index}.{part}prompt_embeds"],
        tensors[f"{index}.{part}prompt_attention_mask"],
    )


def _item(
    one: dict[str, Any],
    other: dict[str, Any],
    at: float,
    tensors: "dict[str, Tensor]",
    number: int,
) -> dict[str, Any]:
    """The record of a text in between; at the ends theirs, with the place."""
    if at in (0, 1):
        return {**(one if at == 0 else other), "at": at}

    def said(name: str) -> str:
        texts = (str(one[name]), str(other[name]))
        if texts[0] == texts[1]:
            return texts[0]
        return f"{texts[0]} [{1 - at:g}] {texts[1]} [{at:g}]"

    lengths = {
        f"{part}tokens": len(tensors[f"{number}.{part}prompt_attention_mask"]) for part in _PARTS
    }
    return {
        "prompt": said("prompt"),
        "negative_prompt": said("negative_prompt"),
        "between": [one["prompt"], other["prompt"]],
        "at": at,
        **lengths,
    }


def _check_pair(
    one: artifacts.Header,
    other: artifacts.Header,
    start: "dict[str, Tensor]",
    end: "dict[str, Tensor]",
    names: str,
) -> int:
    """Refuse what does not go together; the token limit of the family.

    Raises:
        RequestError: other encoders, dtypes or numbers of prompts.
    """
    models = [Model.from_record(header.model) for header in (one, other)]
    encoders = [model.sources["text_encoder"] for model in models]
    if models[0].family != models[1].family or encoders[0] != encoders[1]:
        raise RequestError(
            f"{names} are of different text encoders ({models[0].name}, {models[1].name}): "
            "encode both with one model"
        )
    family = models[0].get_family()
    if "none" not in family.paddings:  # no mask says where a text ends
        raise RequestError(f"{names} are texts of {family.name}, which cannot be stretched")
    if len(one.items) != len(other.items):
        raise RequestError(
            f"{names} hold {len(one.items)} and {len(other.items)} prompts: encode as many each"
        )
    kinds = [{tensor.dtype for tensor in tensors.values()} for tensors in (start, end)]
    if kinds[0] != kinds[1]:
        raise RequestError(f"{names} are of different dtypes: encode both with the same --dtype")
    return family.max_tokens
