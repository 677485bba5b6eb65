"""The copy stream of `CopyingLane` without CUDA: two streams that run as badly as they may.

Copies are made either as late as possible or as early as possible, and the computation always as
late as possible: whatever is not ordered by an event is then seen in the wrong order.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.side_by_side import throttle
from lowvram.weights.lanes import CopyingLane, Unit
from lowvram.weights.pump import Pump, Relay
from lowvram.weights.shards import Shards

UNITS = 9


class Stream:
    """Work in order, done when somebody waits for it; at once, where it is eager."""

    current: "Stream | None" = None

    def __init__(self, eager: bool) -> None:
        self.eager, self.done, self.queue = eager, 0, deque[Callable[[], object]]()

    def add(self, work: Callable[[], object]) -> None:
        self.queue.append(work)
        if self.eager:
            self.synchronize()

    def run_to(self, number: int) -> None:
        while self.done < number:
            work = self.queue.popleft()
            work()
            self.done += 1

    def wait_event(self, event: "Event") -> None:
        self.add(event.synchronize)

    def wait_stream(self, other: "Stream") -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        self.run_to(self.done + len(self.queue))


class Event:
    """How far a stream has to be."""

    def record(self, stream: Stream) -> None:
        self.stream, self.number = stream, stream.done + len(stream.queue)

    def synchronize(self) -> None:
        self.stream.run_to(self.number)


class Copies(TorchDispatchMode):
    """Copies inside `with torch.cuda.stream(…)` are that stream's work."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if Stream.current is not None and func is torch.ops.aten.copy_.default:
            Stream.current.add(lambda: func(*args, **(kwargs or {})))
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def on(stream: Stream) -> Iterator[None]:
    Stream.current = stream
    yield
    Stream.current = None


class Bench:
    """A lane, and a computation that reads what has landed."""

    def __init__(self, folder: Path, slots: int, keep: bool) -> None:
        tensors = {f"{index}": torch.full((1000,), float(index)) for index in range(UNITS)}
        save_file(tensors, folder / "model.safetensors")
        self.shards = Shards(folder)
        self.units = [Unit.of({name: torch.float32}, self.shards) for name in tensors]
        self.lane = CopyingLane(self.shards, self.units, slots, torch.device("cpu"), keep)
        self.computing = Stream(eager=False)
        self.seen: list[torch.Tensor] = []

    def compute(self, view: torch.Tensor) -> None:
        """Later, the computing stream reads a unit."""
        self.computing.add(lambda: self.seen.append(view.clone()))

    def relay(self, turns: int) -> Relay:
        """Once every unit is kept: hand all of them out, so many times."""
        relay = Relay(self.lane, self.units, [*range(UNITS)] * turns)
        for index in [*range(UNITS)] * turns:
            self.compute(relay.take(index)[f"{index}"])
            relay.give_back(index)
        return relay

    def sees_all(self, turns: int) -> bool:
        """Whether the computation has read what each unit holds, in order."""
        self.computing.synchronize()
        self.lane.close()
        found = [each.unique().tolist() for each in self.seen]
        return found == [[float(index)] for index in range(UNITS)] * turns


@pytest.fixture(params=[2, 3], ids=["2 slots", "3 slots"])
def slots(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=[False, True], ids=["late copies", "early copies"])
def eager(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def streams(eager: bool, monkeypatch: pytest.MonkeyPatch) -> Callable[[Bench], None]:
    """From that call on the bench's copies and its computation are in streams of their own."""

    def begin(bench: Bench) -> None:
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: bench.computing)
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        bench.lane._stream = Stream(eager)  # type: ignore[assignment]

    return begin


@pytest.fixture
def kept(slots: int, tmp_path: Path) -> Bench:
    """All units are in host memory."""
    bench = Bench(tmp_path, slots, keep=True)
    pump = Pump(bench.lane, bench.units, range(UNITS))
    for index in range(UNITS):
        assert not bench.lane.holds_all or index
        pump.take(index)
        pump.give_back(index)
    pump.close()
    assert bench.lane.holds_all
    return bench


def test_no_unit_is_seen_before_it_came_or_after_it_went(
    slots: int, tmp_path: Path, streams: Callable[[Bench], None]
) -> None:
    bench = Bench(tmp_path, slots, keep=False)
    streams(bench)
    with Copies():
        for index, unit in enumerate(bench.units):
            slot = index % slots
            sent = bench.lane.send(bench.lane.read(index, unit), unit, slot)
            bench.compute(bench.lane.landed(sent, unit, slot)[f"{index}"])
            bench.lane.done(unit, slot)
        assert bench.sees_all(turns=1)


def test_kept_units_are_sent_without_a_thread_and_nothing_waits(
    kept: Bench, eager: bool, streams: Callable[[Bench], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    streams(kept)
    monkeypatch.setattr(threading, "Thread", None)
    with Copies():
        relay = kept.relay(turns=2)
        assert eager or kept.seen == []  # the host has handed all out, and waited for nothing
        assert kept.sees_all(turns=2)
    with pytest.raises(LookupError):
        relay.take(0)


def test_a_slowed_bus_delays_the_copies_and_nothing_else(
    kept: Bench, eager: bool, streams: Callable[[Bench], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    streams(kept)
    slept: list[int] = []

    def sleep(cycles: int) -> None:
        assert Stream.current is not None  # not the computing one
        Stream.current.add(lambda: slept.append(cycles))

    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(throttle, "cycles_per_second", lambda: 3e9)
    with throttle.bus(rate=1e6), Copies():
        kept.relay(turns=2)
        assert eager or kept.seen == slept == []
        assert kept.sees_all(turns=2)
    assert slept == [3000 * kept.units[0].size] * 2 * UNITS
