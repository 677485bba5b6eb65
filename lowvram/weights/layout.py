"""Which of a network's weights stream, and what they and the others take: from its shapes."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lowvram.errors import ModelError
from lowvram.weights.lanes import ALIGNMENT

if TYPE_CHECKING:
    from lowvram.weights.streamed import Streamed


Blocks = str | tuple[str, ...]
UNITS = ("block", "matrix")


def find_blocks(network: nn.Module, blocks: Blocks) -> list[nn.Module]:
    """A network's blocks in order of use.

    Args:
        blocks: the path of a list of them, or many paths: of lists of blocks, and of blocks.

    Raises:
        ModelError: the network has no such part.
    """
    found: list[nn.Module] = []
    for path in (blocks,) if isinstance(blocks, str) else blocks:
        try:
            module = network.get_submodule(path)
        except AttributeError:
            raise ModelError(
                f"{type(network).__name__} has no {path}: it is built otherwise than its family's"
            ) from None
        found += module.children() if isinstance(module, nn.ModuleList) else [module]
    return found


def staying(count: int, resident: int) -> set[int]:
    """Which of `count` blocks stay, evenly spaced."""
    return {(2 * i + 1) * count // (2 * resident) for i in range(resident)}


def streaming_modules(
    blocks: Sequence[nn.Module], unit: str, resident: int, order: Sequence[str] = ()
) -> list[tuple[int, nn.Module]]:
    """The modules that stream, each with its block's index, in order of use; `order` as `Streamed`
    has it.

    Of `resident` blocks that stay, evenly spaced, the transfers of others hide behind each.
    """
    stay = staying(len(blocks), resident)
    going = [(index, block) for index, block in enumerate(blocks) if index not in stay]
    if unit == "block":
        return going
    return [(index, module) for index, block in going for module in _matrices(block, order)]


def _matrices(block: nn.Module, order: Sequence[str]) -> list[nn.Module]:
    """The matrices of a block in order of use."""
    found = {n: m for n, m in block.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    names = list(found)

    def place(name: str) -> tuple[int, int]:
        parent, _, leaf = name.rpartition(".")
        if leaf not in order:
            return names.index(name), 0
        beside = [i for i, each in enumerate(names) if each.rpartition(".")[0] == parent
                  and each.rpartition(".")[2] in order]  # fmt: skip
        return beside[0], order.index(leaf)

    return [found[name] for name in sorted(names, key=place)]


class Layout:
    """Bytes of a network's tensors by where they stand."""

    def __init__(self, model: nn.Module, blocks: Blocks) -> None:
        self.blocks = find_blocks(model, blocks)
        inside = {id(p) for block in self.blocks for p in block.parameters()}
        tables = {id(m.weight) for m in model.modules() if type(m) is nn.Embedding} - inside
        others = itertools.chain(model.parameters(), model.buffers())
        self.outside = [_bytes(t) for t in others if id(t) not in inside | tables]
        self.blocks_bytes = [unit_bytes(block) for block in self.blocks]

    def most_resident(self, room: int, window: int) -> int:
        """How many blocks can stay in a room beside a window for the others; 0 also where none can.

        By the bytes of their buffers, which alignment makes a little more than their tensors'.
        """
        count = len(self.blocks)
        for stay in range(count - window, 0, -1):
            kept = staying(count, stay)
            moving = [size for i, size in enumerate(self.blocks_bytes) if i not in kept]
            held = sum(self.outside) + sum(self.blocks_bytes[i] for i in kept)
            if held + window * max(moving) <= room:
                return stay
        return 0

    def sizes(self, how: "Streamed") -> list[int]:
        """See `Streamed.sizes`."""
        moving = streaming_modules(self.blocks, how.unit, how.resident)
        largest = max((unit_bytes(module) for _, module in moving), default=0)
        goes = {id(p) for _, module in moving for p in module.parameters()}
        stays = [
            _bytes(p) for block in self.blocks for p in block.parameters() if id(p) not in goes
        ]
        return [*self.outside, *stays, *[largest] * min(how.window, len(moving))]


def fit(
    model: nn.Module, how: "Streamed", room: int | None, units: Sequence[str] = UNITS
) -> tuple["Streamed", list[int]]:
    """The fastest way to stream whose weights hold at most `room` bytes; or the smallest.

    Whole blocks rather than matrices; then, where passes repeat, blocks that stay.

    Args:
        model: for its shapes; may have no storage.
        how: everything that does not depend on the room.
        room: None for no bound: two blocks, and none that stays.
        units: that may come and go.

    Returns:
        that way, and the sizes that it holds (`Streamed.sizes`).
    """
    layout = Layout(model, how.blocks)
    ways: list[Streamed] = []
    if "block" in units:
        stay = 0
        if how.repeats and room is not None:
            stay = layout.most_resident(room, window=2)
        ways.append(replace(how, unit="block", window=2, resident=stay))
    if "matrix" in units:
        ways += [replace(how, unit="matrix", window=window, resident=0) for window in (8, 4, 3, 2)]
    for way in ways:
        held = layout.sizes(way)
        if room is None or sum(held) <= room:
            break
    return way, held


def unit_bytes(module: nn.Module) -> int:
    """As `Unit.of` lays it out."""
    return sum(-(-_bytes(p) // ALIGNMENT) * ALIGNMENT for p in module.parameters())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
