"""Foretells peaks: the real modules run on tensors without storage, and live bytes are counted.

Needs configurations only, no weights and no GPU. The workspace of libraries and, for CUDA, the
caching allocator's segments are added. benchmarks/README.md has it against the CPU's
allocator.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lowvram.memory import allocator, onednn
from lowvram.memory.count import LiveBytes, fake_device

# cuBLASLt's workspace in torch, from the first product with a bias on: 1 MiB on an H100.
_CUBLASLT = 1 << 20
_TRACED_BLOCKS = 2  # the first may differ (T5's makes the position bias), the others are alike

Event = tuple[int, int]  # a storage, and the bytes that came (or went, negative) with it
Work = Callable[[nn.Module, torch.device], object]


@dataclass(frozen=True)
class Trace:
    """What a piece of work takes beside the weights.

    Attributes:
        activations: bytes of tensors at the peak.
        parked: bytes of tensors between two blocks; 0 where there are none.
        flops: floating-point operations of matrix products, convolutions and attention.
        events: the allocations in order.
        result: what the work returns, for shapes and dtypes: tensors by name, without storage;
            empty where it returns anything else.
    """

    activations: int
    parked: int
    flops: int
    events: tuple[Event, ...]
    result: Mapping[str, Tensor] = field(default_factory=dict)


def trace(
    network: nn.Module,
    work: Work,
    blocks: str | tuple[str, ...] = "",
    library: str = "",
) -> Trace:
    """Follow a piece of work without doing it.

    Args:
        network: without storage (`without_storage`); is not changed.
        work: calls it with tensors that it makes on the device given.
        blocks: path of repeated blocks that are all alike but for the first; two of them are
            followed, and the others counted like the second. Of blocks that differ (paths) each is
            followed.
        library: whose workspace is added: "cudnn" (convolutions, and CUDA's attention), "onednn"
            (on a CPU: convolutions, and products in bfloat16) or "".
    """
    network, scale = _copied(network, blocks)
    second = None
    if blocks and isinstance(blocks, str):
        second = list(network.get_submodule(blocks).children())[-1]
    with fake_device() as device:
        make_fake(network, device)
        with torch.inference_mode(), _Tracing(device.type, library) as live:
            if second is not None:
                live.watch(second)
            result = work(network, device)
            live.settle()
    return Trace(
        live.peak,
        live.parked,
        live.flops + scale * live.flops_in_block,
        tuple(live.events),
        {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for name, tensor in (result.items() if isinstance(result, dict) else ())
        },
    )


def _copied(network: nn.Module, blocks: str | tuple[str, ...]) -> tuple[nn.Module, int]:
    """The network with the first blocks only, and how many were left out."""
    if not blocks or not isinstance(blocks, str):
        return copy.deepcopy(network), 0
    path, _, name = blocks.rpartition(".")
    owner = network.get_submodule(path)
    repeated = owner.get_submodule(name)
    assert isinstance(repeated, nn.ModuleList)
    setattr(owner, name, repeated[:_TRACED_BLOCKS])  # only what is kept is copied
    try:
        return copy.deepcopy(network), max(0, len(repeated) - _TRACED_BLOCKS)
    finally:
        setattr(owner, name, repeated)


def without_storage(build: Callable[[], nn.Module]) -> nn.Module:
    """The network for its shapes only."""
    with torch.device("meta"):
        return build()


def cuda_peaks(
    held: Sequence[int], traced: Trace, cublas: int, cap: int | None = None
) -> allocator.Peaks | None:
    """What the caching allocator says of weights of these sizes and of the work with them.

    Returns:
        None where the cap, of bytes reserved, is not enough.
    """
    # keys of the trace are addresses; held tensors get negative ones
    before = [(-1 - index, size) for index, size in enumerate((*held, cublas, _CUBLASLT))]
    return allocator.peaks(itertools.chain(before, traced.events), cap)


class _Tracing(LiveBytes):
    """Also keeps the order of allocations and counts operations."""

    def __init__(self, device_type: str, library: str) -> None:
        super().__init__(device_type)
        self._workspace = {"cudnn": _cudnn, "onednn": onednn.convolution}.get(library)
        self._on_cuda, self._on_cpu = library == "cudnn", library == "onednn"
        self.events: list[Event] = []
        self.flops = self.flops_in_block = self.parked = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        count = _FLOPS.get(func._schema.name.removeprefix("aten::"))
        if count is not None:
            self.flops += count(result, args)
            name = func._schema.name
            if self._workspace and name in ("aten::conv2d", "aten::convolution"):
                self._passing(self._workspace(args[0], args[1], result))
            elif self._on_cuda and name == "aten::scaled_dot_product_attention":
                self._passing(_attends(args, kwargs or {}) - _bytes(result))
            elif self._on_cpu and name in _PRODUCTS:
                self._passing(onednn.product(args[0], result, args[1].dim() == 2))
        return result

    def _passing(self, size: int) -> None:
        """Count what a library takes meanwhile."""
        if size > 0:
            self.peak = max(self.peak, self.now + size)
            self.events += [(0, size), (0, -size)]

    def changed(self, key: int, size: int) -> None:
        self.events.append((key, size))

    def watch(self, block: nn.Module) -> None:
        """Note what is there when the block is entered, and what it computes."""
        before = 0

        def enter(*_: object) -> None:
            nonlocal before
            before = self.flops
            self.parked = max(self.parked, self.now)

        def leave(*_: object) -> None:
            self.flops_in_block += self.flops - before

        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)


def _cudnn(value: Tensor, weight: Tensor, result: Tensor) -> int:
    """A 3x3 convolution takes its input's and output's bytes besides in half precision: within
    0.7 % of 22 published VAE peaks of an RTX 4090, and of an H100's. In single precision the larger
    of both, fitted on the RTX 4090's: an upper bound without TF32, as this package computes (a
    decode at 1024 px held 3,456 MB on an H100, foretold 4,261); with TF32 it took both (5,354 MB).
    """
    if prod(weight.shape[2:]) == 1:
        return 0
    sizes = [_bytes(value), _bytes(result)]
    return max(sizes) if value.dtype == torch.float32 else sum(sizes)


def _attends(args: Any, kwargs: Mapping[str, Any]) -> int:
    """Attention with a mask of its own for every query, as T5's position bias is: CUDA takes the
    plain way in float32, queries, keys, values, scores and weights. An H100 (torch 2.11) did so in
    T5-XXL with 296 and with 300 tokens, though alone, with a mask in order in memory, it took the
    result only at both: an upper bound where a mask is.
    """
    query, key, value = args[:3]
    mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
    if mask is None or mask.stride(-2) == 0 or query.dtype == torch.float32:
        return 0
    if mask.shape[-2] == 1:
        return 0
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    return 4 * (query.numel() + key.numel() + value.numel() + 2 * scores)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _linear(result: Any, args: Any) -> int:
    return int(2 * result.numel() * args[1].shape[-1])


def _product(result: Any, args: Any) -> int:
    return int(2 * result.numel() * args[0].shape[-1])


def _convolution(result: Any, args: Any) -> int:
    return int(2 * result.numel() * prod(args[1].shape[1:]))


def _attention(result: Any, args: Any) -> int:
    return int(4 * args[0].numel() * args[1].shape[-2])


_FLOPS: dict[str, Callable[[Any, Any], int]] = {
    "linear": _linear,
    "matmul": _product,
    "mm": _product,
    "bmm": _product,
    "conv2d": _convolution,
    "convolution": _convolution,
    "scaled_dot_product_attention": _attention,
}

_PRODUCTS = {"aten::linear", "aten::matmul", "aten::mm", "aten::bmm"}


def make_fake(network: nn.Module, device: torch.device) -> None:
    """Its tensors become ones of the fake device; those that are shared stay shared."""
    fakes: dict[int, Tensor] = {}
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in fakes:
                    fakes[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                if tensor is not None:
                    tensors[name] = fakes[id(tensor)]  # type: ignore[assignment]


def sizes_of(tensors: Iterable[Tensor]) -> list[int]:
    """Bytes of each, counted once."""
    return [_bytes(t) for t in {id(t): t for t in tensors}.values()]
