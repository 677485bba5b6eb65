"""Several calls of one network side by side: all pass a block before any enters the next.

Each call runs the network's own forward in a coroutine (greenlet) that stops where it needs weights
which are not there yet. So one pass over the weights serves every call, whatever the forward does
between its blocks, and each call computes exactly what it would compute alone.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet
from torch import nn

T = TypeVar("T")
Supply = Callable[[int], AbstractContextManager[None]]


@dataclass(frozen=True, order=True)
class Stop:
    """Where a call waits: at the door of a block (unit -1), or in it for a unit of weights."""

    block: int
    unit: int


class Lockstep:
    """Stops calls at the blocks of a network, and inside them at its units of weights."""

    def __init__(self, blocks: Sequence[nn.Module], units: Sequence[tuple[int, nn.Module]]) -> None:
        """`units`: modules that need weights, in their order of use, each with its block's index.

        Where a unit is a block itself, its door is where the weights are needed.
        """
        self._members: set[greenlet] = set()
        doors = {id(block) for block in blocks} - {id(module) for _, module in units}
        stops = [(Stop(i, -1), block) for i, block in enumerate(blocks) if id(block) in doors]
        stops += [(Stop(block, unit), module) for unit, (block, module) in enumerate(units)]
        for stop, module in stops:
            # before any other hook, so that a call waits with its inputs as the network left them
            module.register_forward_pre_hook(self._waits_at(stop), prepend=True)

    @property
    def is_running(self) -> bool:
        """Whether the code that asks is part of a call carried out by `run`."""
        return getcurrent() in self._members

    def run(
        self,
        calls: Sequence[Callable[[], T]],
        group: int,
        supply: Supply,
        on_block: Callable[[int], None],
    ) -> list[T]:
        """Carry out the calls and return their results in order.

        Args:
            group: calls that may be inside a block at the same time.
            supply: a context in which the weights of a unit are there.
            on_block: told each block that all calls have passed.
        """
        members: list[greenlet] = [greenlet(call) for call in calls]
        at: dict[greenlet, Any] = {}
        self._members.update(members)
        try:
            for member in members:
                at[member] = member.switch()
            while waiting := [member for member in members if not member.dead]:
                block = min(at[member] for member in waiting).block
                here = [member for member in waiting if at[member].block == block]
                for start in range(0, len(here), group):
                    _pass_block(here[start : start + group], block, at, supply)
                on_block(block)
            return [at[member] for member in members]
        finally:
            for member in members:
                if not member.dead and member:  # started and not finished: unwind its frames
                    member.throw()
            self._members.difference_update(members)

    def _waits_at(self, stop: Stop) -> Callable[..., None]:
        def wait(module: nn.Module, inputs: Any) -> None:
            current = getcurrent()
            if current in self._members:
                current.parent.switch(stop)

        return wait


def _pass_block(
    group: Sequence[greenlet], block: int, at: dict[greenlet, Any], supply: Supply
) -> None:
    """Take a group of calls from the door of a block to the next door, or to their end."""
    for member in group:
        if at[member].unit < 0:
            at[member] = member.switch()
    while inside := [m for m in group if not m.dead and at[m].block == block and at[m].unit >= 0]:
        unit = min(at[member] for member in inside).unit
        with supply(unit):
            for member in inside:
                if at[member].unit == unit:
                    at[member] = member.switch()
