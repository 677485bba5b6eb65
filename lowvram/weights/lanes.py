"""How a unit of weights comes from its file to where it is computed with. Three ways:

- `MappedLane`: the device is the CPU and the file holds the wanted dtype. The mapped file is the
  weights; a reader only brings its pages into memory.
- `ConvertingLane`: the device is the CPU and values have to be converted: into buffers of its own.
- `CopyingLane`: any other device. File to pinned memory, pinned memory to the device; on CUDA by a
  stream of its own, so that the copy runs beside the computation.

`read` and `send` are called by the reader's thread, `landed`, `done` and `close` by the one that
computes; once a lane `holds_all`, that one may call them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lowvram.memory.pinned import PinnedMemory
from lowvram.weights.shards import Shards

ALIGNMENT = 512  # bytes, that of torch's allocator: kernels see the alignment they are tuned for


@dataclass(frozen=True)
class Unit:
    """Weights that come and go together.

    Attributes:
        names: in the file, with the dtype that each shall have.
        places: offset of each in a buffer, in bytes.
        size: of the buffer.
    """

    names: dict[str, torch.dtype]
    places: dict[str, int] = field(repr=False)
    size: int

    @staticmethod
    def of(names: dict[str, torch.dtype], shards: Shards) -> "Unit":
        """Lay tensors out one behind the other."""
        places, end = {}, 0
        for name, dtype in names.items():
            places[name] = end
            count = shards.tensors[name].size // shards.tensors[name].dtype.itemsize
            end += -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return Unit(names, places, end)

    def views(self, buffer: Tensor, shards: Shards) -> dict[str, Tensor]:
        """The unit's tensors in a buffer of bytes."""
        found = {}
        for name, dtype in self.names.items():
            shape, at = shards.tensors[name].shape, self.places[name]
            flat = buffer[at : at + torch.Size(shape).numel() * dtype.itemsize]
            found[name] = flat.view(dtype).view(shape)
        return found


class Lane(Protocol):
    """A way for weights, with room for `slots` units at its end."""

    slots: int
    held_bytes: int  # on the device

    @property
    def holds_all(self) -> bool:
        """Whether every unit is in host memory, so that `read` waits for nothing."""
        ...

    def read(self, index: int, unit: Unit) -> Any:
        """Wait for the file; what `send` needs."""
        ...

    def send(self, read: Any, unit: Unit, slot: int) -> Any:
        """Put the unit into a free slot; what `landed` needs."""
        ...

    def landed(self, sent: Any, unit: Unit, slot: int) -> dict[str, Tensor]:
        """The unit's tensors, for the computation to use from here on."""
        ...

    def done(self, unit: Unit, slot: int) -> None:
        """The computation needs the unit no more."""
        ...

    def close(self) -> None:
        """Free every buffer. The reader has ended."""
        ...


class MappedLane:
    """Weights are views of the mapped file."""

    holds_all = False

    def __init__(self, shards: Shards, units: Sequence[Unit], slots: int) -> None:
        self.shards, self.slots = shards, slots
        self.held_bytes = slots * max(unit.size for unit in units)

    def read(self, index: int, unit: Unit) -> None:
        """Bring the bytes into the page cache."""
        for name in unit.names:
            self.shards.warm(name)

    def send(self, read: None, unit: Unit, slot: int) -> None:
        """Nothing is copied."""

    def landed(self, sent: None, unit: Unit, slot: int) -> dict[str, Tensor]:
        """See `Lane`."""
        return {name: self.shards.view(name) for name in unit.names}

    def done(self, unit: Unit, slot: int) -> None:
        """Take the pages off the process."""
        self.shards.drop(unit.names)

    def close(self) -> None:
        """See `Lane`."""
        self.shards.close()


class ConvertingLane:
    """Weights are converted into buffers in RAM."""

    holds_all = False

    def __init__(self, shards: Shards, units: Sequence[Unit], slots: int) -> None:
        largest = max(unit.size for unit in units)
        self.shards, self.slots, self.held_bytes = shards, slots, slots * largest
        self._buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(slots)]

    def read(self, index: int, unit: Unit) -> None:
        """Bring the bytes into the page cache while the slots are all in use."""
        for name in unit.names:
            self.shards.warm(name)

    def send(self, read: None, unit: Unit, slot: int) -> None:
        """Read and convert into the slot."""
        for name, view in unit.views(self._buffers[slot], self.shards).items():
            self.shards.read_into(name, view)

    def landed(self, sent: None, unit: Unit, slot: int) -> dict[str, Tensor]:
        """See `Lane`."""
        return unit.views(self._buffers[slot], self.shards)

    def done(self, unit: Unit, slot: int) -> None:
        """The slot is simply written over."""

    def close(self) -> None:
        """See `Lane`."""
        self._buffers.clear()


class CopyingLane:
    """Weights pass through host memory to slots on the device."""

    def __init__(
        self,
        shards: Shards,
        units: Sequence[Unit],
        slots: int,
        device: torch.device,
        keep: bool,
    ) -> None:
        """`keep`: hold every unit in host memory once it is read, so that it is read once."""
        largest = max(unit.size for unit in units)
        self.shards, self.slots, self.held_bytes = shards, slots, slots * largest
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._pinned = PinnedMemory(device) if cuda else None
        self._kept: dict[int, Tensor] | None = {} if keep else None
        # Slots first: where they do not fit, nothing is pinned yet that would stay so.
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(slots)]
        self._ring: list[Tensor] = []
        try:
            for _ in range(0 if keep else 2):
                self._ring.append(self._host(largest))
        except BaseException:
            self._unpin()
            raise
        self._copied: list[Any] = [None, None]  # when the last copy out of a ring buffer ended
        self._turn = 0
        self._freed: list[Any] = [None] * slots  # when the computation was done with a slot
        self._views: dict[tuple[int, int], dict[str, Tensor]] = {}  # of a unit in a slot
        self._count = len(units)
        if self._stream is not None:  # what used this memory before us ends first
            self._stream.wait_stream(torch.cuda.current_stream(device))

    @property
    def holds_all(self) -> bool:
        """See `Lane`."""
        return self._kept is not None and len(self._kept) == self._count

    def read(self, index: int, unit: Unit) -> tuple[Tensor, int]:
        """The unit in host memory, and which ring buffer that is."""
        if self._kept is not None:
            if index not in self._kept:
                buffer = self._host(unit.size)
                self._read_into(buffer, unit)
                self._kept[index] = buffer
            return self._kept[index], -1
        self._turn = (self._turn + 1) % len(self._ring)
        if self._copied[self._turn] is not None:
            self._copied[self._turn].synchronize()
        self._read_into(self._ring[self._turn], unit)
        return self._ring[self._turn], self._turn

    def send(self, read: tuple[Tensor, int], unit: Unit, slot: int) -> Any:
        """Start the copy; on CUDA it waits for the computation and not the reverse."""
        host, turn = read
        if self._stream is None:
            self._slots[slot][: unit.size].copy_(host[: unit.size])
            return None
        with torch.cuda.stream(self._stream):
            if self._freed[slot] is not None:
                self._stream.wait_event(self._freed[slot])
            self._slots[slot][: unit.size].copy_(host[: unit.size], non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        if turn >= 0:
            self._copied[turn] = event
        return event

    def landed(self, sent: Any, unit: Unit, slot: int) -> dict[str, Tensor]:
        """See `Lane`."""
        if sent is not None:
            torch.cuda.current_stream(self._slots[slot].device).wait_event(sent)
        key = id(unit), slot  # of a unit's tensors three views each: too much for every time
        if key not in self._views:
            self._views[key] = unit.views(self._slots[slot], self.shards)
        return self._views[key]

    def done(self, unit: Unit, slot: int) -> None:
        """Note when the computation that is under way has passed the slot."""
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._slots[slot].device))
            self._freed[slot] = event

    def close(self) -> None:
        """See `Lane`; copies under way end first."""
        if self._stream is not None:
            self._stream.synchronize()
        self._views.clear()
        self._slots.clear()
        self._ring.clear()
        self._kept = None
        self._unpin()

    def _unpin(self) -> None:
        if self._pinned is not None:
            self._pinned.close()

    def _host(self, size: int) -> Tensor:
        if self._pinned is not None:
            return self._pinned.empty(size)
        return torch.empty(size, dtype=torch.uint8)

    def _read_into(self, buffer: Tensor, unit: Unit) -> None:
        for name, view in unit.views(buffer, self.shards).items():
            self.shards.read_into(name, view)


def choose_lane(
    shards: Shards, units: Sequence[Unit], slots: int, device: torch.device, keep: bool
) -> Lane:
    """The lane for a device: on the CPU without a copy where no value has to be converted."""
    if device.type != "cpu":
        return CopyingLane(shards, units, slots, device, keep)
    as_stored = all(
        shards.tensors[name].dtype == dtype for unit in units for name, dtype in unit.names.items()
    )
    return (MappedLane if as_stored else ConvertingLane)(shards, units, slots)
