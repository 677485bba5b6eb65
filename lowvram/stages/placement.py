"""Which strategy a stage's weights take, and why: as asked, or the fastest within a budget.

Lossless before lossy: whole where it fits, else streamed; 8 and 4 bits only where they are named.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lowvram.errors import RequestError
from lowvram.families.family import Component, Family
from lowvram.memory.predict import CUBLAS_BYTES, peak_activations, without_storage
from lowvram.pixels.blended import BlendedDecode
from lowvram.pixels.strategy import Pixels
from lowvram.pixels.whole import WholeDecode
from lowvram.repository import Model
from lowvram.stages.savings import LADDER, UNGUIDED, Savings, chunk_feed_forward, guided
from lowvram.weights.checkpoint import Weights, build, find_class
from lowvram.weights.lockstep import Lockstep
from lowvram.weights.quantized import Quantized
from lowvram.weights.streamed import UNITS, Streamed, fit
from lowvram.weights.whole import Whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ENCODER_HALF = ("encoder", "quant_conv")  # of an AutoencoderKL: not needed to decode
# A decode in one piece takes this much more than its tensors on CUDA: cuDNN's workspace, fitted on
# published peaks of 22 decodes on an RTX 4090.
_WORKSPACE = 1.58
_TILE = 512  # px, the side of a tile when decoding blended; halved where it does not fit
_LEAST_TILE = 64
_OVERLAP = 0.25  # of a tile, diffusers' default
_OR_STREAM = ", or --weights stream (run: --{}-weights stream)"
_SPARE_RAM = 4 << 30  # bytes left to others before weights are kept in pinned memory


@dataclass(frozen=True)
class Placed:
    """A choice with its reason."""

    weights: Weights
    reason: str
    savings: Savings = LADDER[0]


def place_encoder(
    model: Model, asked: str, dtype: "torch.dtype", device: "torch.device", budget: int, tokens: int
) -> Placed:
    """How the text encoder's weights sit.

    Args:
        asked: "auto", "whole", "8bit", "4bit" or "stream".
        budget: bytes that the stage may hold on the device; 0 for no bound.
        tokens: of the longest text.

    Raises:
        RequestError: it cannot be done within the budget; names what would do.
    """
    family = model.get_family()
    component = family.component("text_encoder")
    stream = Streamed(dtype, component.blocks, parks=True)
    if not budget:
        if asked == "auto" and device.type == "cuda":
            return Placed(Quantized(8, dtype), "the published recipe for GPUs of 8 GB")
        if asked in ("auto", "whole"):
            return Placed(Whole(dtype), "as asked" if asked == "whole" else "no CUDA GPU here")
        return Placed(stream if asked == "stream" else Quantized(int(asked[0]), dtype), "as asked")

    make = _builder(model, component, dtype)
    activations = peak_activations(make, _encode_once(family, tokens)) + _libraries(device)
    needs: dict[str, int] = {}
    for weights in _candidates(asked, dtype):
        needs[weights.name] = _bytes(weights, make()) + activations
        if needs[weights.name] <= budget:
            return Placed(weights, _why(needs, weights.name, budget, asked))
    if asked in ("auto", "stream"):
        streamed, held = fit(without_storage(make), stream, budget - activations)
        needs["stream"] = held + activations
        if streamed is not None:
            if streamed.unit == "matrix":
                spare = budget - held
                streamed = replace(streamed, group=max(1, spare // activations))
            reason = f"{streamed}, {_why(needs, 'stream', budget, asked)}"
            return Placed(streamed, reason)
    other = _OR_STREAM.format("encoder") if asked != "stream" else ""
    raise _too_small("encode", needs, budget, "weights", other)


def place_transformer(
    model: Model,
    asked: str,
    dtype: "torch.dtype",
    device: "torch.device",
    budget: int,
    shape: tuple[int, ...],
    text: "dict[str, Tensor]",
    guidance: bool,
) -> Placed:
    """How the transformer's weights sit, and what a step does to hold less.

    Args:
        asked: "auto", "whole" or "stream".
        shape: of the latents of a batch, `[pictures, channels, height, width]`.
        text: the tensors of the longest text, `[tokens, …]`, for their shapes.

    Raises:
        RequestError: it cannot be done within the budget; names what would do.
    """
    family = model.get_family()
    component = family.component("transformer")
    if not budget and asked != "stream":
        return Placed(Whole(dtype), "the default" if asked == "auto" else "as asked")
    make = _builder(model, component, dtype)
    shapes = without_storage(make)
    whole = _bytes(Whole(dtype), shapes)
    stream = Streamed(dtype, component.blocks, repeats=True)
    if not budget:
        return Placed(replace(stream, keep=_has_room(whole, device)), "as asked")
    needs: dict[str, int] = {}
    for name in ("whole", "stream") if asked == "auto" else (asked,):
        for savings in LADDER if guidance else UNGUIDED:
            blocks = component.blocks if name == "stream" else ""
            step = step_once(family, savings, shape, text, guidance, blocks)
            activations = peak_activations(make, step) + _libraries(device)
            weights: Weights | None = Whole(dtype)
            held = whole
            if name == "stream":
                weights, held = _fit(shapes, stream, budget - activations, savings, whole, device)
            needs[name] = min(needs.get(name, 1 << 62), activations + held)
            if weights is not None and activations + held <= budget:
                needs[name] = activations + held
                why = f"{_why(needs, name, budget, asked)}; {savings}"
                return Placed(weights, f"{weights}, {why}" if blocks else why, savings)
    other = _OR_STREAM.format("transformer") if asked == "whole" else ""
    raise _too_small("denoise", needs, budget, "weights", other)


def place_pixels(
    model: Model,
    asked: str,
    dtype: "torch.dtype",
    device: "torch.device",
    budget: int,
    shape: tuple[int, ...],
) -> tuple[Pixels, str]:
    """How the VAE decodes, and why.

    Args:
        asked: "auto", "whole", "strips" or "blended".
        shape: of the latents of a batch.

    Raises:
        RequestError: it cannot be done within the budget, or not for this VAE.
    """
    from lowvram.pixels.feature_maps import choose_place
    from lowvram.pixels.strips import StripDecode, comfortable_room, least_room, maps_bytes

    if not budget and asked in ("auto", "whole"):
        return WholeDecode(), "as asked" if asked == "whole" else "the default"
    make = _builder(model, model.get_family().component("vae"), dtype)
    vae = without_storage(make)
    scale = 2 ** (len(model.config("vae")["block_out_channels"]) - 1)
    height, width = shape[-2] * scale, shape[-1] * scale
    weights = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in vae.named_parameters()
        if not name.startswith(ENCODER_HALF)
    )
    needs: dict[str, int] = {}

    def whole(latents: tuple[int, ...]) -> int:
        peak = peak_activations(make, lambda net, on: _decode_once(net, latents, dtype, on))
        return weights + int(peak * (_WORKSPACE if device.type == "cuda" else 1))

    if asked in ("auto", "whole"):
        needs["whole"] = whole(shape)
        if needs["whole"] <= budget:
            return WholeDecode(), _why(needs, "whole", budget, asked)
    if asked == "blended":
        tile = _TILE
        while tile >= max(height, width):
            tile //= 2
        if budget:
            needs["blended"] = whole((1, shape[1], tile // scale, tile // scale))
            while needs["blended"] > budget and tile > _LEAST_TILE:
                tile //= 2
                needs["blended"] = whole((1, shape[1], tile // scale, tile // scale))
        if not budget or needs["blended"] <= budget:
            return BlendedDecode(tile, _OVERLAP), "as asked; not the same pixels as whole"
    if asked in ("auto", "strips"):
        least = least_room(vae, height, width, dtype, device.type)
        needs["strips"] = weights + least
        if not budget or needs["strips"] <= budget:
            comfortable = comfortable_room(vae, height, width, dtype, device.type)
            room = budget - weights if budget else max(least, comfortable)
            place = choose_place(maps_bytes(vae, height, width, dtype), device.type)
            held = f"{_gb(weights + room)} at most, {place}"
            return StripDecode(room, place), f"as asked, {held}" if asked != "auto" else (
                f"{held} (whole needs {_gb(needs['whole'])})"
            )
    other = ", or --decode strips" if asked in ("whole", "blended") else ""
    raise _too_small("decode", needs, budget, "pixels", other)


def _decode_once(
    vae: Any, latents: tuple[int, ...], dtype: "torch.dtype", device: "torch.device"
) -> object:
    import torch

    return vae.decode(torch.empty(latents, dtype=dtype, device=device), return_dict=False)[0]


def _fit(
    shapes: "nn.Module",
    stream: Streamed,
    room: int,
    savings: Savings,
    whole: int,
    device: "torch.device",
) -> tuple[Streamed | None, int]:
    """As `streamed.fit`; matrices that come and go cannot be used chunk by chunk."""
    units = ("block",) if savings.feed_forward_chunks > 1 else UNITS
    found, held = fit(shapes, stream, room, units)
    return found and replace(found, keep=_has_room(whole, device)), held


def _candidates(asked: str, dtype: "torch.dtype") -> Iterator[Weights]:
    """Of the resident strategies, those that may be taken."""
    if asked in ("auto", "whole"):
        yield Whole(dtype)
    if asked in ("8bit", "4bit"):
        yield Quantized(int(asked[0]), dtype)


def _bytes(weights: Weights, network: "nn.Module") -> int:
    if isinstance(weights, Quantized):
        return weights.count_bytes(network)
    tensors = {id(t): t for t in (*network.parameters(), *network.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _builder(model: Model, component: Component, dtype: "torch.dtype") -> "Callable[[], nn.Module]":
    config = model.config(component.role)

    def make() -> "nn.Module":
        import torch

        with torch.device("meta"):
            return build(find_class(component.class_name), config, dtype)

    return make


def _encode_once(family: Family, tokens: int) -> "Callable[[nn.Module, torch.device], object]":
    def work(network: "nn.Module", device: "torch.device") -> object:
        import torch

        ids = torch.ones((1, tokens), dtype=torch.long, device=device)
        return family.encode(network, ids, torch.ones_like(ids))

    return work


def step_once(
    family: Family,
    savings: Savings,
    shape: tuple[int, ...],
    text: "dict[str, Tensor]",
    guidance: bool,
    lockstep: str,
) -> "Callable[[nn.Module, torch.device], object]":
    """One prediction, as the stage makes it. `lockstep`: path of blocks to pass side by side."""

    def work(network: "nn.Module", device: "torch.device") -> object:
        import torch

        dtype = next(network.parameters()).dtype
        latents = torch.empty(shape, dtype=dtype, device=device)
        timestep = torch.empty(1, device=device)
        empty = {
            name: torch.empty(
                each.shape, dtype=dtype if each.is_floating_point() else each.dtype, device=device
            )
            for name, each in text.items()
        }
        texts = [empty] * shape[0]
        chunk_feed_forward(network, savings.feed_forward_chunks)
        if not guidance or savings.branches == "together":
            conditions = family.conditions(texts, texts if guidance else [])
            return family.predict(network, latents, timestep, conditions, 2.0 if guidance else 1.0)
        alone = family.conditions(texts, [])

        def each(calls: Any) -> list[Any]:
            if not lockstep:
                return [call() for call in calls]
            blocks = list(network.get_submodule(lockstep).children())
            units = list(enumerate(blocks))
            return Lockstep(blocks, units).run(
                calls, len(calls), lambda unit: nullcontext(), lambda block: None
            )

        return guided(lambda _: family.predict(network, latents, timestep, alone, 1.0), each, 2.0)

    return work


def _libraries(device: "torch.device") -> int:
    return CUBLAS_BYTES if device.type == "cuda" else 0


def _has_room(size: int, device: "torch.device") -> bool:
    """Whether so much memory can be pinned for weights that are read again every step."""
    import psutil

    return device.type == "cuda" and psutil.virtual_memory().available > 2 * size + _SPARE_RAM


def _why(needs: dict[str, int], name: str, budget: int, asked: str) -> str:
    others = [f"{other} needs {_gb(size)}" for other, size in needs.items() if other != name]
    said = "as asked, " if asked != "auto" else ""
    return f"{said}{_gb(needs[name])} of {_gb(budget)}" + (f" ({others[0]})" if others else "")


def _too_small(
    stage: str, needs: dict[str, int], budget: int, kind: str, else_use: str
) -> RequestError:
    """`kind`: of what the names in `needs` are strategies. `else_use`: another way out."""
    name, least = min(needs.items(), key=lambda item: item[1])
    return RequestError(
        f"{stage} with {kind} {name} needs {_gb(least)} on the device and --stage-budget is "
        f"{_gb(budget)}: use --stage-budget {-(-least // (1 << 20))}MiB{else_use}"
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
