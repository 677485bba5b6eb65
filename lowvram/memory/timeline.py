"""Numbers over time: a table that thins itself out, and the thread that fills it."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

log = logging.getLogger(__name__)

COLUMNS = (
    "seconds",
    "allocated_bytes",
    "reserved_bytes",
    "process_bytes",
    "device_bytes",
    "rss_bytes",
    "disk_read_bytes",
)
# Every look costs the work 0.3 ms to 1 ms where processors are scarce (benchmarks/micro/meter.py).
INTERVAL_SECONDS = 0.1
MOST_ROWS = 2000
MOST_STEPS = 1000
# A look costs at most this part of the time between two.
_MOST_OVERHEAD = 0.01

Row = tuple[float | None, ...]  # in the order of COLUMNS; the first is never None


class Timeline:
    """Rows in the order of time, at most `most_rows`.

    One too many, and each two neighbours become one that holds the greater of each number: what
    is left has half as many rows, and every peak.
    """

    def __init__(self, most_rows: int = MOST_ROWS) -> None:
        self.most_rows = most_rows
        self.stride = 1  # looks that go into one row
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Append a row."""
        if len(self.rows) >= self.most_rows:
            self.rows = [most(self.rows[i : i + 2]) for i in range(0, len(self.rows), 2)]
            self.stride *= 2
        self.rows.append(row)

    def peaks(self) -> dict[str, float | None]:
        """The greatest number of each column: thinning has lost none."""
        return dict(zip(COLUMNS, most(self.rows), strict=True)) if self.rows else {}

    def to_json(self) -> dict[str, Any]:
        """{"columns": […], "rows": [[…], …]}, without the columns that nothing is known of."""
        known = [i for i in range(len(COLUMNS)) if any(row[i] is not None for row in self.rows)]
        return {
            "columns": [COLUMNS[i] for i in known],
            "rows": [[_rounded(row[i]) for i in known] for row in self.rows],
        }


class Marks:
    """When things ended. Phases are all kept; of more than `most_steps` steps, every second."""

    def __init__(self, most_steps: int = MOST_STEPS) -> None:
        self.most_steps = most_steps
        self._phases: list[tuple[float, str]] = []
        self._steps: list[tuple[float, str]] = []

    def phase(self, seconds: float, name: str) -> None:
        """A phase has ended."""
        self._phases.append((seconds, name))

    def step(self, seconds: float, name: str) -> None:
        """A step, text or picture is done."""
        if len(self._steps) >= self.most_steps:
            del self._steps[::2]
        self._steps.append((seconds, name))

    def to_json(self) -> list[list[Any]]:
        """[[seconds, name], …] in the order of time."""
        marks = sorted(self._steps + self._phases, key=lambda mark: mark[0])
        return [[_rounded(seconds), name] for seconds, name in marks]


class Sampler:
    """Calls a function again and again, in a thread that ends with `stop` or with the program."""

    def __init__(self, look: Callable[[], None], interval: Callable[[], float]) -> None:
        """`interval`: seconds from one look to the next; longer where looking is expensive."""
        self._look, self._interval = look, interval
        # Not an Event, whose waiting is 60 lines of Python that have left the processor's cache.
        self._running = threading.Lock()
        self._running.acquire()
        self._thread = threading.Thread(target=self._run, name="lowvram-meter", daemon=True)
        self.looks = 0
        self.busy_seconds = 0.0  # of a processor

    def start(self) -> None:
        """Begin; once only."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for a look that is under way."""
        if self._thread.is_alive():
            if self._running.locked():  # a Ctrl-C may have interrupted an earlier call
                self._running.release()
            self._thread.join()

    def _run(self) -> None:
        while not self._running.acquire(timeout=self._pause()):
            try:
                self._look()
            except Exception as error:  # the work goes on, with fewer numbers
                log.warning("memory is no longer sampled (%s)", error)
                return
            self.looks += 1
            # Of a processor, not of a clock: most of a look's wall time is waiting for the
            # interpreter while the work computes, which costs the work nothing.
            self.busy_seconds = time.thread_time()

    def _pause(self) -> float:
        mean = self.busy_seconds / max(1, self.looks)
        return max(self._interval(), mean / _MOST_OVERHEAD)


def most(rows: Sequence[Row]) -> Row:
    """The greatest number of each column; None where no row knows one."""
    return tuple(
        max((n for n in column if n is not None), default=None)
        for column in zip(*rows, strict=True)
    )


def _rounded(value: float | None) -> float | None:
    return round(value, 3) if isinstance(value, float) else value
