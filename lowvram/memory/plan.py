"""Chooses: of the ways a stage can work, fastest first, the first that keeps within the room.

Knows no model and no strategy: a way is an `Option` with its need, and whoever can offer some lists
them in order. Lossless ones come before lossy ones, and lossy ones only where they are named.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lowvram.errors import NothingSmallerError, RequestError
from lowvram.memory.rates import Rates

S = TypeVar("S")


@dataclass(frozen=True)
class Need:
    """What a way of working takes. Bytes.

    Attributes:
        allocated: on the device, at the peak.
        reserved: by the device's allocator, at the peak; None on a CPU.
        host: in RAM beside what an idle interpreter with the libraries takes.
        read: from files.
        transferred: from the host to the device, in all.
        flops: floating-point operations, in all.
        overlaps: whether reading, carrying and computing run beside each other.
    """

    allocated: int
    reserved: int | None = None
    host: int = 0
    read: int = 0
    transferred: int = 0
    flops: int = 0
    overlaps: bool = False

    def seconds(self, rates: Rates, dtype: str) -> float:
        """An estimate, for a machine of these rates that computes in that dtype ("float32")."""
        parts = [
            self.read / rates.disk_bytes_per_second,
            self.transferred / (rates.transfer_bytes_per_second or float("inf")),
            self.flops / rates.flops.get(dtype, rates.flops["float32"]),
        ]
        return max(parts) if self.overlaps else sum(parts)

    def foretold(self, room: "Room", rates: Rates, dtype: str, base: int) -> dict[str, Any]:
        """By the names of the report.

        Args:
            base: RAM of the process before anything is loaded.
        """
        on_card = self.reserved is not None
        return {
            "peak_allocated_bytes": self.allocated,
            "peak_reserved_bytes": self.reserved,
            "peak_process_bytes": (self.reserved or 0) + room.context if on_card else None,
            "peak_rss_bytes": base + self.host + (0 if self.transferred else self.allocated),
            "disk_read_bytes": self.read,
            "seconds": self.seconds(rates, dtype),
        }


@dataclass(frozen=True)
class Option(Generic[S]):
    """One way of working.

    Attributes:
        name: as on the command line.
        says: the details of it, for people; "" for none.
        lossy: whether it changes the picture: then it is taken only where it is named.
    """

    strategy: S
    name: str
    need: Need
    says: str = ""
    lossy: bool = False

    def is_allowed(self, asked: str) -> bool:
        """Whether who asks for "auto", or for a name, may get it."""
        return self.name == asked or (asked == "auto" and not self.lossy)

    def __str__(self) -> str:
        return f"{self.name}, {self.says}" if self.says else self.name


@dataclass(frozen=True)
class Room:
    """What a stage may allocate on the device.

    Attributes:
        bytes: 0 for no bound.
        option: with which the user said so: "--vram"; "" where it is what is free.
        overhead: bytes that the option counts beside these; a user who is told to ask for more is
            told with them.
        libraries: bytes of it that cuBLAS takes.
        context: bytes that the process takes on the device beside all tensors.
        guessed: whether that was not measured on this machine.
    """

    bytes: int
    option: str = ""
    overhead: int = 0
    libraries: int = 0
    context: int = 0
    guessed: bool = False

    def holds(self, need: Need) -> bool:
        """Whether it is enough."""
        return not self.bytes or max(need.allocated, need.reserved or 0) <= self.bytes


@dataclass(frozen=True)
class Choice(Generic[S]):
    """An option with the reason for it."""

    option: Option[S]
    reason: str


def choose(
    stage: str, options: Iterable[Option[S]], room: Room, steps_down: int, way_out: str
) -> Choice[S]:
    """The first option that the room holds; or after an out-of-memory, one further down.

    Args:
        stage: for messages.
        options: fastest first.
        steps_down: options that would fit and have run out of memory already.
        way_out: another one than a larger room; "" for none.

    Raises:
        RequestError: none fits; names the smallest, and the room that it needs.
        NothingSmallerError: none is left that is smaller.
    """
    passed: list[Option[S]] = []
    tried = 0
    for option in options:
        if not room.holds(option.need):
            passed.append(option)
        elif tried < steps_down:
            tried += 1
            passed.append(option)
        else:
            return Choice(option, _reason(option, passed, room, steps_down))
    if tried:
        raise NothingSmallerError(f"{stage} has no way of working left that takes less")
    raise _too_small(stage, passed, room, way_out)


def _reason(option: Option[S], passed: Sequence[Option[S]], room: Room, steps_down: int) -> str:
    says = [option.says] if option.says else []
    if room.bytes:
        says.append(f"{show(_size(option))} of {show(room.bytes)}")
    if steps_down:
        says.append(f"after {passed[-1].name} ran out of memory")
    elif faster := [each for each in passed if each.name != option.name][:1]:
        says[-1] += f" ({faster[0].name} needs {show(_size(faster[0]))})"
    if room.overhead and room.guessed:
        says.append(f"{show(room.overhead)} assumed for the context (lowvram doctor measures it)")
    return ", ".join(says) or "as it is fastest"


def _too_small(stage: str, options: Sequence[Option[S]], room: Room, way_out: str) -> RequestError:
    least = min(options, key=_size)
    needed = _size(least) + room.overhead
    there, other = f"{show(room.bytes)} are free", "close other programs"
    if room.option:
        there = f"{room.option} is {show(room.bytes + room.overhead)}"
        other = f"use {room.option} {-(-needed // (1 << 20))}MiB"
    needs = f"{stage} with {least.name} needs {show(needed)} on the device and {there}"
    return RequestError(f"{needs}: {other}{way_out}")


def _size(option: Option[Any]) -> int:
    return max(option.need.allocated, option.need.reserved or 0)


def show(size: float) -> str:
    """Bytes for people, decimal."""
    return f"{size / 1e9:.2f} GB" if abs(size) >= 1e8 else f"{size / 1e6:.1f} MB"
