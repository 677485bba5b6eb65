"""Brings units of weights ahead of their use, in a known order: by a thread while they are read,
and without one once all of them lie in host memory.
"""

import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowvram.weights.lanes import Lane, Unit

Sent = tuple[int, Any, int]  # a unit's index, what `Lane.send` gave for it, and its slot


class Supply(ABC):
    """Units one after the other, each in a slot of the device until it is given back."""

    def __init__(self, lane: Lane, units: Sequence[Unit]) -> None:
        self._lane, self._units = lane, units
        self._held: dict[int, int] = {}  # unit to slot, of those that are in use

    def take(self, index: int) -> dict[str, Tensor]:
        """The tensors of a unit, which must be the next one in order.

        Raises:
            What the reader met: OSError, ModelError, an out-of-memory.
            LookupError: another unit is next, or none.
        """
        found, sent, slot = self._next()
        if found != index:
            raise LookupError(f"unit {index} is wanted, {found} is next")
        self._held[index] = slot
        return self._lane.landed(sent, self._units[index], slot)

    def give_back(self, index: int) -> None:
        """The unit is not needed any more, and its slot is free."""
        slot = self._held.pop(index)
        self._lane.done(self._units[index], slot)
        self._free(slot)

    @abstractmethod
    def close(self) -> None:
        """Nothing runs on."""

    @abstractmethod
    def _next(self) -> Sent:
        """The unit that is next in order, sent."""

    @abstractmethod
    def _free(self, slot: int) -> None:
        """A unit may be sent into the slot."""


class Pump(Supply):
    """Reads ahead as far as there are free slots; `close` ends the thread, whatever it does."""

    def __init__(self, lane: Lane, units: Sequence[Unit], order: Iterable[int]) -> None:
        super().__init__(lane, units)
        self._order = order
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stop = threading.Event()
        for slot in range(lane.slots):
            self._slots.put(slot)
        self._thread = threading.Thread(target=self._run, name="lowvram-reader", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. It may finish the read that it is in."""
        self._stop.set()
        self._slots.put(-1)
        self._thread.join()

    def _next(self) -> Sent:
        item: Sent | BaseException = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # nothing follows it: whoever asks again gets it too
            raise item
        return item

    def _free(self, slot: int) -> None:
        self._slots.put(slot)

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                for index in self._order:
                    if self._stop.is_set():
                        return
                    unit = self._units[index]
                    read = self._lane.read(index, unit)
                    slot = self._slots.get()
                    if self._stop.is_set():
                        return
                    self._ready.put((index, self._lane.send(read, unit, slot), slot))
            self._ready.put(LookupError("no further unit was announced"))
        except BaseException as error:
            self._ready.put(error)


class Relay(Supply):
    """Sends units that lie in host memory, as a slot becomes free.

    The host only hands out work here: the copy waits for the computation on the device, and the
    computation for the copy. With a thread in between, each of a block's many operations gives the
    interpreter away to it and waits to get it back: on an H100 nothing of the copies was hidden.
    """

    def __init__(self, lane: Lane, units: Sequence[Unit], order: Iterable[int]) -> None:
        super().__init__(lane, units)
        self._order = iter(order)
        self._coming: deque[Sent] = deque()
        for slot in range(lane.slots):
            self._free(slot)

    def close(self) -> None:
        """Nothing runs that would have to end."""

    def _next(self) -> Sent:
        if not self._coming:
            raise LookupError("no further unit was announced")
        return self._coming.popleft()

    def _free(self, slot: int) -> None:
        index = next(self._order, None)
        if index is not None:
            unit = self._units[index]
            with torch.inference_mode():
                sent = self._lane.send(self._lane.read(index, unit), unit, slot)
            self._coming.append((index, sent, slot))
