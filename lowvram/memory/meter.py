"""Measures a stage: seconds of each phase, and the peaks of every memory counter there is.

Four device numbers, because they differ: allocated (tensors), reserved (the caching allocator),
process (with context and libraries, from the driver) and device (everybody's). Host memory is
the process's peak resident set. What a machine does not tell is None.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lowvram.memory.counters import process_bytes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StageReport:
    """What one stage took. Bytes and seconds; None where it is not known.

    Attributes:
        reasons: why weights and dtype were chosen so.
        weights_bytes: of the loaded component, counted.
        left_allocated_bytes: still allocated on the device after the release.
        left_behind: names of the component's tensors that something still holds.
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

    def to_json(self) -> dict[str, Any]:
        """The report as JSON types."""
        return asdict(self)


class Meter:
    """Counts from its construction on."""

    def __init__(self, device: "torch.device") -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()
        self._process: int | None = None
        self._used: int | None = None
        self._before = self.allocated()
        _reset_peak_rss()
        if device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of what happens inside to the phase of that name."""
        start = time.perf_counter()
        try:
            yield
            self.synchronize()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.sample()

    def synchronize(self) -> None:
        """Wait for the device, so that seconds are those of the work."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)

    def sample(self) -> None:
        """Look at the counters that keep no peak of their own.

        The allocator returns nothing to the driver before it is flushed, so that a look at the
        end of a phase sees the phase's peak.
        """
        if self.device.type != "cuda":
            return
        import torch

        self._process = _most(self._process, process_bytes(self.device))
        try:
            self._used = _most(self._used, torch.cuda.device_memory_used(self.device))
        except Exception:  # no NVML: the number stays unknown
            self._used = None

    def allocated(self) -> int | None:
        """Bytes of tensors on the device now."""
        if self.device.type != "cuda":
            return None
        import torch

        return torch.cuda.memory_allocated(self.device)

    def left_allocated(self) -> int | None:
        """Bytes on the device that were not there at the start."""
        now = self.allocated()
        return None if now is None or self._before is None else now - self._before

    def peaks(self) -> dict[str, int | None]:
        """The peaks so far, by the names of `StageReport`."""
        allocated = reserved = None
        if self.device.type == "cuda":
            import torch

            allocated = torch.cuda.max_memory_allocated(self.device)
            reserved = torch.cuda.max_memory_reserved(self.device)
        return {
            "peak_allocated_bytes": allocated,
            "peak_reserved_bytes": reserved,
            "peak_process_bytes": self._process,
            "peak_device_bytes": self._used,
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def total_seconds(self) -> float:
        """Seconds since the meter was made."""
        return time.perf_counter() - self._start


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, since the last reset where the system can reset it."""
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


def _reset_peak_rss() -> None:
    """Linux only; elsewhere the peak is that of the process's life."""
    if sys.platform == "linux":
        try:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")
        except OSError:  # not allowed in some containers: the peak is then that of the process
            return


def _most(a: int | None, b: int | None) -> int | None:
    known = [n for n in (a, b) if n is not None]
    return max(known) if known else None
