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


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("eager", [False, True], ids=["late copies", "early copies"])
def test_no_unit_is_seen_before_it_came_or_after_it_went(
    eager: bool, slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"{index}": torch.full((1000,), float(index)) for index in range(UNITS)}
    save_file(tensors, tmp_path / "model.safetensors")
    shards = Shards(tmp_path)
    units = [Unit.of({name: torch.float32}, shards) for name in tensors]
    computing, copying = Stream(eager=False), Stream(eager)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    lane = CopyingLane(shards, units, slots, torch.device("cpu"), keep=False)
    lane._stream = copying  # type: ignore[assignment]
    seen: list[torch.Tensor] = []
    with Copies():
        for index, unit in enumerate(units):
            slot = index % slots
            sent = lane.send(lane.read(index, unit), unit, slot)
            views = lane.landed(sent, unit, slot)
            view = views[f"{index}"]
            computing.add(lambda view=view: seen.append(view.clone()))
            lane.done(unit, slot)
        computing.synchronize()
        lane.close()
    assert [each.unique().tolist() for each in seen] == [[float(i)] for i in range(UNITS)]


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("eager", [False, True], ids=["late copies", "early copies"])
def test_kept_units_are_sent_without_a_thread_and_nothing_waits(
    eager: bool, slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"{index}": torch.full((1000,), float(index)) for index in range(UNITS)}
    save_file(tensors, tmp_path / "model.safetensors")
    shards = Shards(tmp_path)
    units = [Unit.of({name: torch.float32}, shards) for name in tensors]
    lane = CopyingLane(shards, units, slots, torch.device("cpu"), keep=True)
    pump = Pump(lane, units, range(UNITS))
    for index in range(UNITS):
        assert not lane.holds_all or index
        pump.take(index)
        pump.give_back(index)
    pump.close()
    assert lane.holds_all
    computing, copying = Stream(eager=False), Stream(eager)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(threading, "Thread", None)
    lane._stream = copying  # type: ignore[assignment]
    seen: list[torch.Tensor] = []
    with Copies():
        relay = Relay(lane, units, [*range(UNITS)] * 2)
        for index in [*range(UNITS)] * 2:
            view = relay.take(index)[f"{index}"]
            computing.add(lambda view=view: seen.append(view.clone()))
            relay.give_back(index)
        assert eager or seen == []  # the host has handed all out, and waited for nothing
        computing.synchronize()
        lane.close()
    assert [each.unique().tolist() for each in seen] == [[float(i)] for i in range(UNITS)] * 2
    with pytest.raises(LookupError):
        relay.take(0)
