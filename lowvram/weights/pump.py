"""Brings units of weights ahead of their use, in a known order: by a thread while they are read,
and without one once all of them lie in host memory.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowvram.weights.lanes import Lane, Unit


class Pump:
    """Reads ahead as far as there are free slots; `close` ends the thread, whatever it does."""

    def __init__(self, lane: Lane, units: Sequence[Unit], order: Iterable[int]) -> None:
        self._lane, self._units, self._order = lane, units, order
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._held: dict[int, int] = {}  # unit to slot, of those that are in use
        self._stop = threading.Event()
        for slot in range(lane.slots):
            self._free.put(slot)
        self._thread = threading.Thread(target=self._run, name="lowvram-reader", daemon=True)
        self._thread.start()

    def take(self, index: int) -> dict[str, Tensor]:
        """The tensors of a unit, which must be the next one in order.

        Raises:
            What the reader met: OSError, ModelError, an out-of-memory.
            LookupError: another unit is next.
        """
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # nothing follows it: whoever asks again gets it too
            raise item
        found, sent, slot = item
        if found != index:
            raise LookupError(f"unit {index} is wanted, {found} is next")
        self._held[index] = slot
        return self._lane.landed(sent, self._units[index], slot)

    def give_back(self, index: int) -> None:
        """The unit is not needed any more, and its slot is free."""
        slot = self._held.pop(index)
        self._lane.done(self._units[index], slot)
        self._free.put(slot)

    def close(self) -> None:
        """End the thread. It may finish the read that it is in."""
        self._stop.set()
        self._free.put(-1)
        self._thread.join()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                for index in self._order:
                    if self._stop.is_set():
                        return
                    unit = self._units[index]
                    read = self._lane.read(index, unit)
                    slot = self._free.get()
                    if self._stop.is_set():
                        return
                    self._ready.put((index, self._lane.send(read, unit, slot), slot))
            self._ready.put(LookupError("no further unit was announced"))
        except BaseException as error:
            self._ready.put(error)


class Relay:
    """Sends units that lie in host memory, as a slot becomes free; as `Pump` to who computes.

    The host only hands out work here: the copy waits for the computation on the device, and the
    computation for the copy. With a thread in between, each of a block's many operations gives the
    interpreter away to it and waits to get it back: on an H100 nothing of the copies was hidden.
    """

    def __init__(self, lane: Lane, units: Sequence[Unit], order: Iterable[int]) -> None:
        self._lane, self._units, self._order = lane, units, iter(order)
        self._coming: deque[tuple[int, Any, int]] = deque()
        self._held: dict[int, int] = {}
        for slot in range(lane.slots):
            self._send(slot)

    def take(self, index: int) -> dict[str, Tensor]:
        """See `Pump.take`."""
        if not self._coming:
            raise LookupError("no further unit was announced")
        found, sent, slot = self._coming.popleft()
        if found != index:
            raise LookupError(f"unit {index} is wanted, {found} is next")
        self._held[index] = slot
        return self._lane.landed(sent, self._units[index], slot)

    def give_back(self, index: int) -> None:
        """See `Pump.give_back`; the next unit is sent into the slot."""
        slot = self._held.pop(index)
        self._lane.done(self._units[index], slot)
        self._send(slot)

    def close(self) -> None:
        """Nothing runs that would have to end."""

    def _send(self, slot: int) -> None:
        index = next(self._order, None)
        if index is not None:
            unit = self._units[index]
            with torch.inference_mode():
                sent = self._lane.send(self._lane.read(index, unit), unit, slot)
            self._coming.append((index, sent, slot))
