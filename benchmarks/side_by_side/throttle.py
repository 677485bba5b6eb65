"""What a slower disk and a narrower bus would cost: a token bucket around the reader's own calls.

The product knows nothing of it: two of its functions are wrapped from outside while it works.
Where the bytes come from the page cache and cross a fast bus, what is added makes up the
difference, so that at most `rate` bytes a second pass.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_CALIBRATED_CYCLES = 50_000_000


class TokenBucket:
    """Lets `rate` bytes a second pass, counted from the end of the transfer before."""

    def __init__(
        self,
        rate: float,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if rate <= 0:
            raise ValueError(f"a rate of {rate} bytes a second lets nothing pass")
        self.rate, self._now, self._sleep = rate, now, sleep
        self._free_at = 0.0
        self._lock = threading.Lock()

    def begin(self) -> float:
        """When a transfer that is asked for now would begin: not before the last has ended."""
        return max(self._now(), self._free_at)

    def end(self, began: float, amount: int) -> float:
        """Wait until `amount` bytes from `began` on would have passed; seconds that it slept."""
        with self._lock:
            done = max(began, self._free_at) + amount / self.rate
            self._free_at = done
        wait = done - self._now()
        if wait > 0:
            self._sleep(wait)
        return max(0.0, wait)


@contextmanager
def disk(rate: float | None) -> Iterator[None]:
    """Every read of weights takes as long as a disk of `rate` bytes a second would; None: as is."""
    if rate is None:
        yield
        return
    from lowvram.weights import shards

    fill, bucket = shards._fill, TokenBucket(rate)

    def slow(file: Any, out: Any, path: Any) -> None:
        began = bucket.begin()
        fill(file, out, path)
        bucket.end(began, out.numel() * out.element_size())

    with _in_place_of(shards, "_fill", slow):
        yield


@contextmanager
def bus(rate: float | None) -> Iterator[None]:
    """Every copy of a unit to the device takes as long as at `rate` bytes a second; None: as is.

    The wait is a kernel in the stream that copies, behind what the copy itself waits for, so that
    neither the host nor the computation waits for it; the copy follows, and so what is told is a
    little more than a bus of that rate costs. Without a stream (on a CPU) nothing is slowed.
    """
    if rate is None:
        yield
        return
    import torch

    from lowvram.weights import lanes

    send = lanes.CopyingLane.send
    cycles = cycles_per_second() / rate if torch.cuda.is_available() else 0.0

    def slow(lane: Any, read: Any, unit: Any, slot: int) -> Any:
        if lane._stream is not None:
            with torch.cuda.stream(lane._stream):
                if lane._freed[slot] is not None:
                    lane._stream.wait_event(lane._freed[slot])
                torch.cuda._sleep(int(cycles * unit.size))
        return send(lane, read, unit, slot)

    with _in_place_of(lanes.CopyingLane, "send", slow):
        yield


def cycles_per_second() -> float:
    """Of `torch.cuda._sleep`, under load: the card's clock rises with it."""
    import torch

    torch.cuda._sleep(_CALIBRATED_CYCLES)
    torch.cuda.synchronize()
    started = time.perf_counter()
    torch.cuda._sleep(_CALIBRATED_CYCLES)
    torch.cuda.synchronize()
    return _CALIBRATED_CYCLES / (time.perf_counter() - started)


@contextmanager
def _in_place_of(owner: Any, name: str, function: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before)
