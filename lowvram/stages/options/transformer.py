"""The ways of the transformer: whole or streamed, each with less and less held in a step."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lowvram.families.family import Blocks, Family
from lowvram.memory.host import available_bytes
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
from lowvram.stages.savings import (
    LADDER,
    MASK,
    UNGUIDED,
    Savings,
    chunk_feed_forward,
    guided,
)
from lowvram.weights.checkpoint import Weights
from lowvram.weights.layout import UNITS, find_blocks, fit
from lowvram.weights.lockstep import Lockstep
from lowvram.weights.streamed import Streamed
from lowvram.weights.whole import Whole

if TYPE_CHECKING:
    from torch import Tensor, nn

_SPARE_RAM = 4 << 30  # bytes left to others before weights are kept in pinned memory


@dataclass(frozen=True)
class Placed:
    """How the weights sit, and what a step does to hold less."""

    weights: Weights
    savings: Savings


@dataclass(frozen=True)
class Steps:
    """What is to be denoised.

    Attributes:
        shape: of the latents of a batch, `[pictures, channels, height, width]`.
        text: the tensors of the longest text, `[tokens, …]`, for their shapes.
        guidance: whether there is a negative text.
        count: of steps, over all batches.
    """

    shape: tuple[int, ...]
    text: "dict[str, Tensor]"
    guidance: bool
    count: int


def transformer_options(
    model: Model,
    asked: str,
    dtype: torch.dtype,
    device: torch.device,
    room: Room,
    steps: Steps,
) -> Iterator[Option[Placed]]:
    """Fastest first.

    Args:
        asked: "auto" or "all", "whole" or "stream".
        room: to which streaming fits itself; a stream that is asked for without a budget keeps to
            two blocks, for who asks for it wants little held.
    """
    family = model.get_family()
    component = family.component("transformer")
    network = shapes(model, "transformer", dtype)
    whole = Whole(dtype).sizes(network)
    stored = stored_bytes(model, "transformer", network)
    keep = _has_room(sum(whole), device)
    counts = device.type == "cpu" or _convolves(network)
    library = LIBRARIES.get(device.type, "") if counts else ""
    stream = Streamed(dtype, component.blocks, component.order, repeats=True, keep=keep)
    fills = bool(room.bytes) and (asked != "stream" or bool(room.option))
    traces: dict[tuple[Savings, Blocks], Trace] = {}
    names = ("whole", "stream") if asked in ("auto", "all") else (asked,)
    for name in names:
        for savings in _ladder(steps):
            # Only branches in turn meet blocks side by side.
            apart = name == "stream" and savings.branches == "in turn"
            blocks = component.blocks if apart else ""
            if (savings, blocks) not in traces:
                step = step_once(family, savings, steps, blocks)
                traces[savings, blocks] = trace(network, step, component.blocks, library)
            traced = traces[savings, blocks]
            if name == "whole":
                took = need(
                    whole,
                    traced,
                    device,
                    room,
                    host=copy_on_host(whole, device),
                    read=stored,
                    transferred=sum(whole),
                    repeats=steps.count,
                )
                yield Option(Placed(Whole(dtype), savings), name, took, str(savings))
                continue
            how, took = _fit_stream(
                stream, network, traced, device, room, fills, savings, steps, stored
            )
            yield Option(Placed(how, savings), name, took, f"{how}; {savings}")


def _fit_stream(
    stream: Streamed,
    network: "nn.Module",
    traced: Trace,
    device: torch.device,
    room: Room,
    fills: bool,
    savings: Savings,
    steps: Steps,
    stored: int,
) -> tuple[Streamed, Need]:
    """The fastest way to stream that the room holds, or the smallest."""
    # Matrices that come and go cannot be used chunk by chunk.
    units = ("block",) if savings.feed_forward_chunks > 1 else UNITS
    for left in LEFT_TO_ALLOCATOR:
        free = int((1 - left) * room.bytes) - traced.activations if fills else None
        how, held = fit(network, stream, free, units)
        host = sum(Whole(stream.dtype).sizes(network)) if how.keep else 2 * max(held)
        took = need(
            held,
            traced,
            device,
            room,
            host=host if device.type != "cpu" else 0,
            read=stored,
            transferred=steps.count * how.moving(network),
            repeats=steps.count,
            overlaps=True,
        )
        if room.holds(took) or device.type != "cuda":
            break
    return how, took


def step_once(family: Family, savings: Savings, steps: Steps, lockstep: Blocks) -> Work:
    """One prediction, as the stage makes it. `lockstep`: blocks to pass side by side."""

    def work(network: "nn.Module", device: torch.device) -> object:
        dtype = next(network.parameters()).dtype
        latents = torch.empty(steps.shape, dtype=dtype, device=device)
        timestep = torch.empty(1, device=device)
        empty = {
            name: torch.empty(
                each.shape, dtype=dtype if each.is_floating_point() else each.dtype, device=device
            )
            for name, each in steps.text.items()
        }
        texts = [empty] * steps.shape[0]
        chunk_feed_forward(network, savings.feed_forward_chunks)
        if not steps.guidance or savings.branches == "together":
            conditions = family.conditions(texts, texts if steps.guidance else [])
            scale = 2.0 if steps.guidance else 1.0
            return family.predict(network, latents, timestep, conditions, scale)
        alone = family.conditions(texts, [])

        def each(calls: Any) -> list[Any]:
            if not lockstep:
                return [call() for call in calls]
            blocks = find_blocks(network, lockstep)
            units = list(enumerate(blocks))
            return Lockstep(blocks, units).run(
                calls, len(calls), lambda unit: nullcontext(), lambda block: None
            )

        return guided(lambda _: family.predict(network, latents, timestep, alone, 1.0), each, 2.0)

    return work


def _ladder(steps: Steps) -> tuple[Savings, ...]:
    """What goes with this network: one that masks no text is meant to see all of it."""
    ways = LADDER if steps.guidance else UNGUIDED
    return ways if MASK in steps.text else tuple(replace(each, text="padded") for each in ways)


def _convolves(network: "nn.Module") -> bool:
    """Whether it convolves with more than its patches: a kernel that is no stride."""
    return any(
        isinstance(module, torch.nn.Conv2d) and module.kernel_size != module.stride
        for module in network.modules()
    )


def _has_room(size: int, device: torch.device) -> bool:
    """Whether so much memory can be pinned for weights that are read again every step."""
    return device.type == "cuda" and available_bytes() > 2 * size + _SPARE_RAM
