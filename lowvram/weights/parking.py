"""Tensors between blocks lie on the host: inputs come to the device, outputs go back."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

HOST = torch.device("cpu")


def park(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Have what computes between the blocks do so on the device, and leave its results on the host.

    Args:
        blocks: of the model, each of which computes as a whole.
    """
    for module in _entered_from_outside(model, blocks):
        _compute_on(module, device)


def _entered_from_outside(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """The blocks, and outside of them every module with weights of its own."""
    yield from blocks
    inside = {id(module) for block in blocks for module in block.modules()}
    for module in model.modules():
        if id(module) not in inside and module._parameters:
            yield module


def _compute_on(module: nn.Module, device: torch.device) -> None:
    """Inputs to the device before a module computes, outputs back to the host after it."""

    def moved(value: Any, to: torch.device) -> Any:
        if isinstance(value, Tensor):
            return value.to(to)
        if type(value) in (tuple, list):
            return type(value)(moved(each, to) for each in value)
        return {k: moved(v, to) for k, v in value.items()} if type(value) is dict else value

    module.register_forward_pre_hook(
        lambda module, args, kwargs: (moved(args, device), moved(kwargs, device)), with_kwargs=True
    )
    module.register_forward_hook(lambda module, inputs, output: moved(output, HOST))
