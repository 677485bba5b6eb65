"""Measures a stage: seconds of each phase, peaks, and every memory counter over time.

Four device numbers, because they differ: allocated (tensors), reserved (the caching allocator),
process (with context and libraries, from the driver) and device (everybody's). Host memory is
the process's resident set. What a machine does not tell is None.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from lowvram.memory.counters import device_counters
from lowvram.memory.leftovers import LeftTensor
from lowvram.memory.process import peak_rss_bytes, process_counters, reset_peak_rss
from lowvram.memory.spill import spill_note, windows_below
from lowvram.memory.timeline import INTERVAL_SECONDS, Marks, Sampler, Timeline

if TYPE_CHECKING:
    import torch

    from lowvram.memory.count import LiveBytes


@dataclass(frozen=True)
class StageReport:
    """What one stage took. Bytes and seconds; None where it is not known.

    Attributes:
        reasons: why weights and dtype were chosen so.
        weights_bytes: of the loaded component, counted.
        left_allocated_bytes: still allocated on the device after the release.
        left_behind: names of the component's tensors that something still holds.
        left_tensors: tensors on the device that were not there before, largest first.
        timeline: {"columns": [names], "rows": [[numbers]]}, see `timeline.COLUMNS`.
        marks: [seconds, name] of each step and phase, when it had ended.
        disk_read_bytes: see `process.ProcessCounters`.
        budget_bytes: what the stage was allowed to hold on the device.
        predicted: some of peak_allocated_bytes, peak_reserved_bytes, peak_process_bytes,
            peak_rss_bytes, disk_read_bytes and seconds, as foretold before the stage.
        settings: every setting that changed a byte, and the model's name.
        notes: what did not go as it should, with the way out.
    """

    stage: str
    device: str
    weights: str
    dtype: str
    reasons: list[str]
    seconds: float
    load_seconds: float
    compute_seconds: float
    weights_bytes: int
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    peak_process_bytes: int | None
    peak_device_bytes: int | None
    peak_rss_bytes: int
    left_allocated_bytes: int | None
    left_behind: list[str] = field(default_factory=list)
    left_tensors: list[LeftTensor] = field(default_factory=list)
    timeline: dict[str, Any] = field(default_factory=dict)
    marks: list[list[Any]] = field(default_factory=list)
    disk_read_bytes: int | None = None
    budget_bytes: int | None = None
    predicted: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON types."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "StageReport":
        """The report that `to_json` gave."""
        left = [LeftTensor(**each) for each in value["left_tensors"]]
        return StageReport(**{**value, "left_tensors": left})


class Meter:
    """Counts from its construction on; inside `with meter:` also samples every counter over time.

    Attributes:
        seconds: of each phase.
        tracker: where set, its bytes are the allocated ones: for a CPU, which counts no tensors.
    """

    def __init__(self, device: "torch.device", interval_seconds: float = INTERVAL_SECONDS) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.tracker: LiveBytes | None = None
        self.timeline = Timeline()
        self._beside: int | None = None  # bytes of the process that the allocator has not reserved
        self._marks = Marks()
        self._start = time.perf_counter()
        self._counters = device_counters(device)
        self._host = process_counters()
        self._looking = threading.Lock()  # the thread looks, and every phase's end
        self.sampler = Sampler(self.sample, lambda: interval_seconds * self.timeline.stride)
        self._before = self.allocated()
        reset_peak_rss()
        self._counters.reset_peaks()

    def __enter__(self) -> Self:
        self.sample()
        self.sampler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sampler.stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of what happens inside to the phase of that name."""
        start = time.perf_counter()
        try:
            yield
            self.synchronize()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self._marks.phase(self.total_seconds(), name)
            self.sample()

    def mark(self, name: str) -> None:
        """Note that a step, text or picture is done.

        Without waiting for the device: on a GPU, which is given work ahead, a mark may be early by
        about a step.
        """
        self._marks.step(self.total_seconds(), name)

    def synchronize(self) -> None:
        """Wait for the device, so that seconds are those of the work."""
        if self.device.type != "cpu":
            import torch

            torch.accelerator.synchronize(self.device)

    def sample(self) -> None:
        """Look at every counter once.

        What keeps no peak of its own is known only as it was at the looks.
        """
        with self._looking:
            allocated, reserved = self._counters.allocator()
            process, used = self._counters.driver()
            if (
                process is not None
                and reserved is not None
                and reserved == self._counters.allocator()[1]  # nothing has come or gone meanwhile
            ):
                self._beside = max(self._beside or 0, process - reserved)
            self.timeline.add(
                (
                    self.total_seconds(),
                    allocated if self.tracker is None else self.tracker.now,
                    reserved,
                    process,
                    used,
                    self._host.rss_bytes(),
                    self._host.disk_read_bytes(),
                )
            )

    def allocated(self) -> int | None:
        """Bytes of tensors on the device now."""
        return self._counters.allocator()[0] if self.tracker is None else self.tracker.now

    def left_allocated(self) -> int | None:
        """Bytes on the device that were not there at the start; None on a CPU, whose memory the
        stage's results share.
        """
        if self._before is None:
            return None
        now = self.allocated()
        return None if now is None else now - self._before

    def peaks(self) -> dict[str, int | None]:
        """The peaks so far, by the names of `StageReport`."""
        seen = self.timeline.peaks()
        allocated, reserved = self._counters.peaks()
        if self.tracker is not None:
            allocated = self.tracker.peak
        return {
            "peak_allocated_bytes": _known(allocated, seen.get("allocated_bytes")),
            "peak_reserved_bytes": _known(reserved, seen.get("reserved_bytes")),
            "peak_process_bytes": self._process_peak(seen.get("process_bytes"), reserved),
            "peak_device_bytes": _known(seen.get("device_bytes")),
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def _process_peak(self, seen: float | None, reserved: int | None) -> int | None:
        """What was seen; or, where memory came and went between two looks, the peak of what the
        allocator reserved and what the process took beside it.
        """
        if reserved is None or self._beside is None:
            return _known(seen)
        return max(int(seen or 0), reserved + self._beside)

    def over_time(self) -> dict[str, Any]:
        """What was seen over time, by the names of `StageReport`."""
        return {
            "timeline": self.timeline.to_json(),
            "marks": self._marks.to_json(),
            "disk_read_bytes": self._host.disk_read_bytes(),
        }

    def notes(self) -> list[str]:
        """What did not go as it should: memory of the system in place of the card's."""
        below = windows_below() if self.device.type == "cuda" else None
        total = self._counters.capacity() if below else None
        return [note] if (note := spill_note(self.timeline.rows, total, below)) else []

    def total_seconds(self) -> float:
        """Seconds since the meter was made."""
        return time.perf_counter() - self._start


def _known(*values: float | None) -> int | None:
    """The first that is known."""
    return next((int(value) for value in values if value is not None), None)
