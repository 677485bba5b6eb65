"""What a stage decides before it loads anything: how it works, why, and what that will take."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import psutil

from lowvram.memory.budget import find_room
from lowvram.memory.plan import Option, Room, choose
from lowvram.memory.rates import Rates, assumed, recall
from lowvram.request.tasks import AnyTask

if TYPE_CHECKING:
    import torch

S = TypeVar("S")


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


def rates_of(device: "torch.device") -> Rates:
    """As measured on this machine, else assumed."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    here = device.type in ("cpu", found and found.type)  # a plan may be for another card
    return (recall(str(device)) if here else None) or assumed(device.type)
