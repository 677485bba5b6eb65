"""What a stage decides before it loads anything: how it works, why, and what that will take."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import psutil

from lowvram.errors import RequestError
from lowvram.memory.budget import find_room
from lowvram.memory.plan import Option, Room, choose
from lowvram.memory.rates import Rates, assumed, recall
from lowvram.request.tasks import AnyTask
from lowvram.stages.result import Outcomes

if TYPE_CHECKING:
    import torch

S = TypeVar("S")
G = TypeVar("G")


@dataclass(frozen=True)
class Decision(Generic[S]):
    """A strategy with its reason.

    Attributes:
        room: that it was chosen for.
        predicted: what it will take, by the names of the report.
    """

    strategy: S
    reason: str
    room: Room
    predicted: dict[str, Any]

    @property
    def budget_bytes(self) -> int | None:
        """What the stage was allowed to hold on the device; None where nothing was said."""
        return self.room.bytes if self.room.option else None


def decide(
    stage: str,
    task: AnyTask,
    device: "torch.device",
    dtype: str,
    offer: Callable[[Room], Iterable[Option[S]]],
    way_out: str,
) -> Decision[S]:
    """Take the fastest way that the budget has room for.

    Args:
        dtype: that is computed in, "float16".
        offer: the ways, fastest first, for a room.
        way_out: another one than a larger budget; "" for none.

    Raises:
        RequestError: none fits. NothingSmallerError: what fits has run out of memory.
    """
    rates = rates_of(device)
    room = find_room(device, task.vram, task.stage_budget, rates)
    choice = choose(stage, offer(room), room, task.steps_down, way_out)
    predicted = choice.option.need.foretold(room, rates, dtype, psutil.Process().memory_info().rss)
    return Decision(choice.option.strategy, choice.reason, room, predicted)


def decide_for_all(
    groups: list[G],
    decide_for: Callable[[Sequence[G]], Decision[S]],
    largest_of: Callable[[Sequence[G]], Sequence[G]],
    tasks_of: Callable[[G], Iterable[int]],
    outcomes: Outcomes,
) -> Decision[S] | None:
    """One way of working for all groups of tasks; None where none is left.

    Where no way has room, the largest are given up and taken out of `groups`, and why is what came
    of their tasks.

    Args:
        decide_for: raises `RequestError` where no way has room.
        tasks_of: the places of a group's tasks in the list of the stage.
    """
    while groups:
        try:
            return decide_for(groups)
        except RequestError as error:
            for group in list(largest_of(groups)):
                groups.remove(group)
                for index in tasks_of(group):
                    outcomes.settle(index, RequestError(str(error)))
    return None


def rates_of(device: "torch.device") -> Rates:
    """As measured on this machine, else assumed."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    here = device.type in ("cpu", found and found.type)  # a plan may be for another card
    return (recall(str(device)) if here else None) or assumed(device.type)
