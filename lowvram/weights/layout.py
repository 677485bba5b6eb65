"""Which of a network's weights stream, and what they and the others take: from its shapes."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lowvram.weights.lanes import ALIGNMENT

if TYPE_CHECKING:
    from lowvram.weights.streamed import Streamed


def streaming_modules(
    blocks: Sequence[nn.Module], unit: str, resident: int
) -> list[tuple[int, nn.Module]]:
    """The modules that stream, each with its block's index, in order of use.

    Of `resident` blocks that stay, evenly spaced, the transfers of others hide behind each.
    """
    count = len(blocks)
    stay = {(2 * i + 1) * count // (2 * resident) for i in range(resident)}
    going = [(index, block) for index, block in enumerate(blocks) if index not in stay]
    if unit == "block":
        return going
    return [
        (index, module)
        for index, block in going
        for module in block.modules()
        if isinstance(module, nn.Linear)
    ]


class Layout:
    """Bytes of a network's tensors by where they stand."""

    def __init__(self, model: nn.Module, blocks: str) -> None:
        self.blocks = list(model.get_submodule(blocks).children())
        inside = {id(p) for block in self.blocks for p in block.parameters()}
        tables = {id(m.weight) for m in model.modules() if type(m) is nn.Embedding} - inside
        others = itertools.chain(model.parameters(), model.buffers())
        self.outside = [_bytes(t) for t in others if id(t) not in inside | tables]
        self.largest = max(unit_bytes(block) for block in self.blocks)

    def sizes(self, how: "Streamed") -> list[int]:
        """See `Streamed.sizes`."""
        moving = streaming_modules(self.blocks, how.unit, how.resident)
        largest = self.largest
        if how.unit == "matrix":
            largest = max((unit_bytes(module) for _, module in moving), default=0)
        goes = {id(p) for _, module in moving for p in module.parameters()}
        stays = [
            _bytes(p) for block in self.blocks for p in block.parameters() if id(p) not in goes
        ]
        return [*self.outside, *stays, *[largest] * min(how.window, len(moving))]


def unit_bytes(module: nn.Module) -> int:
    """As `Unit.of` lays it out."""
    return sum(-(-_bytes(p) // ALIGNMENT) * ALIGNMENT for p in module.parameters())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
