"""What a stage may hold on the device: as the user says, or what is free; and that it holds to it.

`--vram` is what the process may take on the card, context and libraries included; `--stage-budget`
is what tensors may take. Imports torch when called.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lowvram.errors import RequestError
from lowvram.memory.capacity import free_bytes
from lowvram.memory.host import available_bytes
from lowvram.memory.plan import Room, show
from lowvram.memory.rates import Rates, assumed

if TYPE_CHECKING:
    import torch

    from lowvram.memory.count import LiveBytes

log = logging.getLogger(__name__)

# Left to the desktop, and to what others take meanwhile, where the user sets no budget.
MARGIN_BYTES = 300 << 20
_RAM_MARGIN_BYTES = 1 << 30


def parse_bytes(option: str, text: str | None) -> int | None:
    """A size such as "0.5GiB", "800MB" or "2G" (= GiB) in bytes; None stays None.

    Raises:
        RequestError: not of that form.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*([kmgt])(i?b)?\s*", text.lower())
    if match is None:
        raise RequestError(f"{option} {text[:40]!r} is not a size: for example 0.5GiB or 800MB")
    base = 1000 if match[3] == "b" else 1024
    return int(float(match[1]) * base ** ("kmgt".index(match[2]) + 1))


def find_room(device: "torch.device", vram: int, stage_budget: int, rates: Rates) -> Room:
    """What a stage may allocate.

    Args:
        vram: bytes that the process may take on the device; 0 for what is free now.
        stage_budget: bytes that tensors may take, which then counts instead; 0 for none.
        rates: for what context and libraries take on a GPU, measured or assumed.

    Raises:
        RequestError: nothing is left beside the context.
    """
    libraries = context = 0
    if device.type == "cuda":
        guess = assumed(device.type)
        libraries = _known(rates.cublas_bytes, guess.cublas_bytes)
        context = _known(rates.context_bytes, guess.context_bytes)
    if stage_budget:
        return Room(stage_budget, "--stage-budget", libraries=libraries, context=context)
    if vram:
        guessed = device.type == "cuda" and not rates.measured
        if vram <= context:
            says = ", assumed: lowvram doctor measures it" if guessed else ""
            raise RequestError(
                f"--vram {show(vram)} is less than a process takes on a GPU without any tensor "
                f"({show(context)}{says}): use at least that, and what the stages need besides"
            )
        return Room(vram - context, "--vram", context, libraries, context, guessed)
    free = free_bytes(device)
    if free is not None:
        return Room(max(1 << 20, free - MARGIN_BYTES), libraries=libraries, context=context)
    if device.type == "cpu":
        return Room(max(1 << 20, available_bytes() - _RAM_MARGIN_BYTES))
    return Room(0, libraries=libraries, context=context)


@contextmanager
def capped(device: "torch.device", room: Room) -> Iterator[None]:
    """Let the allocator of a GPU refuse what is beyond the room, instead of spilling."""
    if device.type != "cuda" or not room.bytes:
        if device.type not in ("cpu", "cuda") and room.option:
            log.warning(
                "%s is kept by choice of way, and not enforced on %s", room.option, device.type
            )
        yield
        return
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    # By number: of all calls for a device this one takes no "cuda" without it.
    index = torch.cuda.current_device() if device.index is None else device.index
    # A byte more: torch multiplies again and cuts off, and often came out one byte under the room.
    torch.cuda.set_per_process_memory_fraction(min(1.0, (room.bytes + 1) / total), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


@contextmanager
def tracked(device: "torch.device", room: Room, weights: int) -> Iterator["LiveBytes | None"]:
    """Keep to the room that was asked for where no allocator does: on a CPU, by counting tensors.

    Takes the demo model's 20 steps from 0.32 to 0.65 s (two CPU cores), so it is not done where
    nobody asked.

    Args:
        weights: bytes that are there already.
    """
    if device.type != "cpu" or not room.option:
        yield None
        return
    from lowvram.memory.count import LiveBytes

    with LiveBytes(device.type, weights, room.bytes) as live:
        yield live


@contextmanager
def untracked() -> Iterator[None]:
    """A context inside of `tracked` in which nothing new is counted: the files that are read and
    written while a component is loaded are no part of its work.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


def _known(measured: int | None, guess: int | None) -> int:
    return (guess or 0) if measured is None else measured
