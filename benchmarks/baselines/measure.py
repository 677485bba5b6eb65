"""Seconds, peaks and bytes read of each stage of a contender that runs in this process.

A contender says `stages.enter("denoise")` where one stage ends and the next begins; everything
before the first picture's text (imports apart, loading included) belongs to the stage during which
it happens. Several pictures add up: seconds are summed, of peaks the largest is kept.
"""

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.memory.counters import device_counters, or_none
from lowvram.memory.process import peak_rss_bytes, process_counters, reset_peak_rss

if TYPE_CHECKING:
    import torch

NAMES = ("encode", "denoise", "decode", "all")
PEAKS = (
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "peak_process_bytes",
    "peak_rss_bytes",
    "peak_anonymous_bytes",
)
_LOOK_SECONDS = 0.05


class Stages:
    """Measures between calls of `enter`; a stage that is entered again goes on.

    Attributes:
        now: the stage that is under way; "load" before the first.
    """

    def __init__(self, device: "torch.device") -> None:
        self.now = "load"
        self.rows: dict[str, dict[str, Any]] = {}
        self._device = device
        self._counters = device_counters(device)
        self._host = process_counters()
        self._seen: dict[str, int] = {}
        self._looking = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._begin()
        self._thread.start()

    def enter(self, name: str) -> None:
        """Let the stage of that name begin, or go on."""
        self._end()
        self.now = name
        self._begin()

    def close(self) -> list[dict[str, Any]]:
        """End the last stage; a row for each in the order in which they were entered."""
        self._end()
        self._ended.set()
        self._thread.join()
        return [{"name": name, **row} for name, row in self.rows.items()]

    def _begin(self) -> None:
        with self._looking:
            self._seen = {}
        reset_peak_rss()
        self._counters.reset_peaks()
        self._read = self._host.disk_read_bytes()
        self._started = time.perf_counter()

    def _end(self) -> None:
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._started
        self._look()
        allocated, reserved = self._counters.peaks()
        with self._looking:
            seen = dict(self._seen)
        if "process" in seen:  # a short peak falls between two looks
            seen["process"] = max(seen["process"], reserved or 0)
        found: dict[str, int | None] = {
            "peak_allocated_bytes": allocated,
            "peak_reserved_bytes": reserved,
            "peak_process_bytes": seen.get("process"),
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_anonymous_bytes": seen.get("anonymous"),
        }
        read = self._host.disk_read_bytes()
        own = None if read is None or self._read is None else read - self._read
        self._add(self.now, {"seconds": seconds, **found, "read_bytes": own})

    def _add(self, name: str, row: dict[str, Any]) -> None:
        if name == "load":  # nothing but the making of this object
            return
        self.rows[name] = together([self.rows[name], row]) if name in self.rows else row

    def _look_on(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        """Note what has no peak counter of its own."""
        process, _ = self._counters.driver()
        now = {"process": process, "anonymous": or_none(anonymous_bytes)}
        with self._looking:
            for name, amount in now.items():
                if amount is not None:
                    self._seen[name] = max(amount, self._seen.get(name, 0))


def together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows as one: seconds and bytes read summed, of each peak the largest; null where unknown."""

    def known(name: str) -> list[Any]:
        return [row[name] for row in rows if row.get(name) is not None]

    sums = {name: sum(known(name)) if known(name) else None for name in ("seconds", "read_bytes")}
    peaks = {name: max(known(name), default=None) for name in PEAKS}
    return {"seconds": sums["seconds"], **peaks, "read_bytes": sums["read_bytes"]}


def anonymous_bytes(process: int | None = None) -> int:
    """Resident memory of a process that no file stands behind (Linux), of this one if none is said.

    Pages of mapped files can be dropped at any time; these are what it cannot do without.
    """
    status = Path(f"/proc/{process or os.getpid()}/status").read_text(encoding="ascii")
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def cap(device: "torch.device", limit: int) -> int:
    """Bound this process to `limit` bytes on the card, as a smaller card would.

    The caching allocator alone can be bounded, so that what a process takes without any tensor is
    measured first and taken off.

    Returns:
        bytes that the allocator may take.

    Raises:
        RuntimeError: nothing is left beside the context.
    """
    import torch

    torch.zeros(1, device=device)
    torch.cuda.synchronize(device)
    process, _ = device_counters(device).driver()
    reserved = torch.cuda.memory_reserved(device)
    context = _ASSUMED_CONTEXT if process is None else process - reserved
    room = limit - context
    if room <= 0:
        raise RuntimeError(f"the context alone takes {context} of {limit} bytes")
    total = torch.cuda.get_device_properties(device).total_memory
    index = torch.cuda.current_device()  # by number: this call takes no "cuda" without it
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), index)
    return room


_ASSUMED_CONTEXT = 500 << 20  # where the driver does not tell a process's memory
