"""The ways of the text encoder: whole, streamed by blocks, streamed by matrices; or quantised."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lowvram.families.family import Family
from lowvram.memory.plan import Need, Option, Room
from lowvram.memory.predict import Trace, Work, trace
from lowvram.repository import Model
from lowvram.stages.options.component import (
    LEFT_TO_ALLOCATOR,
    LIBRARIES,
    copy_on_host,
    need,
    shapes,
    stored_bytes,
)
from lowvram.weights.checkpoint import Weights
from lowvram.weights.layout import fit
from lowvram.weights.quantized import Quantized
from lowvram.weights.streamed import Streamed
from lowvram.weights.whole import Whole

if TYPE_CHECKING:
    from torch import nn

# Texts that are under way at once lie on the host between the blocks; this much of it is enough.
_PARKED_BYTES = 1 << 30
_NAMED_ONLY = ("8bit", "4bit")  # lossy


@dataclass(frozen=True)
class Texts:
    """What is to be encoded: how many different texts, and the tokens of the longest."""

    count: int
    tokens: int


def encoder_options(
    model: Model,
    asked: str,
    dtype: torch.dtype,
    device: torch.device,
    room: Room,
    texts: Texts,
) -> Iterator[Option[Weights]]:
    """Fastest first.

    Args:
        asked: "auto" (what loses nothing), "whole", "8bit", "4bit", "stream", or "all".
        room: to which streaming fits itself.
    """
    component = model.get_family().component("text_encoder")
    network = shapes(model, "text_encoder", dtype)
    stored = stored_bytes(model, "text_encoder", network)
    library = LIBRARIES.get(device.type, "")
    once = encode_once(model.get_family(), texts.tokens)
    traced = trace(network, once, component.blocks, library)
    if device.type == "cpu":  # where the device is the host, the results stay there
        floats = [each for each in traced.result.values() if each.is_floating_point()]
        results = (texts.count - 1) * sum(each.numel() * each.element_size() for each in floats)
        traced = replace(traced, activations=traced.activations + results)
    for weights in (Whole(dtype), Quantized(8, dtype), Quantized(4, dtype)):
        named = (
            (weights.name, "all") if weights.name in _NAMED_ONLY else (weights.name, "auto", "all")
        )
        if asked in named:
            yield _resident(weights, network, traced, device, room, texts, stored)
    if asked in ("auto", "stream", "all"):
        stream = Streamed(dtype, component.blocks, component.order, parks=True)
        yield from _streamed(stream, network, traced, device, room, texts, stored)


def encode_once(family: Family, tokens: int) -> Work:
    """One text, as the stage encodes it."""

    def work(network: "nn.Module", device: torch.device) -> object:
        ids = torch.ones((1, tokens), dtype=torch.long, device=device)
        return family.encode(network, ids, torch.ones_like(ids))

    return work


def _resident(
    weights: Whole | Quantized,
    network: "nn.Module",
    traced: Trace,
    device: torch.device,
    room: Room,
    texts: Texts,
    stored: int,
) -> Option[Weights]:
    held = weights.sizes(network)
    if isinstance(weights, Quantized):
        extra = weights.workspace(network, texts.tokens, device.type)
        traced = replace(
            traced,
            activations=traced.activations + extra,
            events=((0, extra), *traced.events),
        )
    took = need(
        held,
        traced,
        device,
        room,
        host=copy_on_host(held, device) if isinstance(weights, Whole) else 0,
        read=stored,
        transferred=sum(held),
        repeats=texts.count,
    )
    return Option(weights, weights.name, took, lossy=weights.name in _NAMED_ONLY)


def _streamed(
    stream: Streamed,
    network: "nn.Module",
    traced: Trace,
    device: torch.device,
    room: Room,
    texts: Texts,
    stored: int,
) -> Iterator[Option[Weights]]:
    """By blocks, then by matrices; as many texts at once as there is room for."""
    for unit in ("block", "matrix"):
        for left in LEFT_TO_ALLOCATOR:
            filled = int((1 - left) * room.bytes)
            how, took = _fit_stream(
                stream, unit, network, traced, device, room, filled, texts, stored
            )
            if room.holds(took) or device.type != "cuda":
                break
        yield Option(how, how.name, took, str(how))


def _fit_stream(
    stream: Streamed,
    unit: str,
    network: "nn.Module",
    traced: Trace,
    device: torch.device,
    room: Room,
    filled: int,
    texts: Texts,
    stored: int,
) -> tuple[Streamed, Need]:
    """Streaming by a unit, with windows and texts at once that fill so many bytes of the room."""
    free = filled - traced.activations if room.bytes else None
    how, held = fit(network, stream, free, (unit,))
    spare = max(0, filled - sum(held)) if room.bytes else _PARKED_BYTES
    parked = spare - traced.activations if device.type == "cpu" else _PARKED_BYTES
    together = max(1, parked // max(1, traced.parked))
    group = max(1, spare // max(1, traced.activations)) if unit == "matrix" else 1
    how = replace(how, together=int(together), group=int(min(group, together)))
    beside = traced.activations * (min(texts.count, how.group) - 1)
    passes = -(-texts.count // how.together)
    on_host = traced.parked * (min(texts.count, how.together) - 1)
    if device.type == "cpu":  # the host is the device
        held, on_host = [*held, on_host], 0
    else:
        on_host += 2 * max(held)
    return how, need(
        [*held, beside],
        traced,
        device,
        room,
        host=on_host,
        read=passes * stored,
        transferred=passes * sum(Whole(stream.dtype).sizes(network)),
        repeats=texts.count,
        overlaps=True,
    )
