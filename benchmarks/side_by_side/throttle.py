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
# A sleep overshoots by 0.1 ms on a quiet machine and by some ms on a busy one, and reads of 1 MiB
# come every 0.3 ms at 3.5 GB/s: sleeping for each would be slower than the rate.
_DEBT_SECONDS = 0.005
_CREDIT_SECONDS = 0.02


class TokenBucket:
    """Lets `rate` bytes a second pass on average, whatever a sleep overshoots by.

    What runs ahead of the rate is slept off once it is more than `_DEBT_SECONDS`; what lags behind
    it, as after a sleep that was too long or while numbers were converted, is made up for,
    `_CREDIT_SECONDS` of it at most: a disk that nobody asks reads little ahead.
    """

    def __init__(
        self,
        rate: float,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if rate <= 0:
            raise ValueError(f"a rate of {rate} bytes a second lets nothing pass")
        self.rate, self._now, self._sleep = rate, now, sleep
        self._due = now()  # when what has passed would have passed at that rate
        self._lock = threading.Lock()

    @contextmanager
    def passing(self, amount: int) -> Iterator[None]:
        """Around a transfer of `amount` bytes: sleep after it where it was too fast."""
        began = self._now()
        yield
        with self._lock:
            self._due = max(self._due, began - _CREDIT_SECONDS) + amount / self.rate
            debt = self._due - self._now()
        if debt > _DEBT_SECONDS:
            self._sleep(debt)


@contextmanager
def disk(rate: float | None) -> Iterator[None]:
    """Every read of weights takes as long as a disk of `rate` bytes a second would; None: as is."""
    if rate is None:
        yield
        return
    from lowvram.weights import shards

    fill, bucket = shards._fill, TokenBucket(rate)

    def slow(file: Any, out: Any, path: Any) -> None:
        with bucket.passing(out.numel() * out.element_size()):
            fill(file, out, path)

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
