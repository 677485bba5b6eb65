"""One process of a benchmark: its output, how it ended, and its memory seen from outside.

A process that fails, takes too long or takes the machine's last memory is a result, not an error.
Memory is that of the largest process of its tree (Linux, /proc): a sum would count the pages that a
forked child shares with its parent twice. Resident pages of files ("file": weights that are mapped,
libraries) can be dropped at any time; "anonymous" ones are what a process cannot do without.
"""

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
_SAMPLE_SECONDS = 0.2
# Below this the system starts to drop the pages of programs, and then to kill them as it likes.
LEAST_FREE_BYTES = 600_000_000


def run_once(
    command: Sequence[str], timeout: float, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Output, error (None if none), seconds, peaks in bytes and bytes read of a process's tree.

    Args:
        timeout: seconds; it is killed then.
        environment: in addition to this process's own.
    """
    started, cpu_before = time.monotonic(), _cpu_of_children()
    variables = {**os.environ, **first_on_path(), **(environment or {})}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        seen, rang = _Watch(process), False
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _kill(process)
            output, _ = process.communicate()
            rang = True
        stopped = seen.ended()
        errors.seek(0)
        lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return {
        "output": output,
        "error": stopped or how_it_ended(process.returncode, rang, timeout, lines),
        "wall_seconds": time.monotonic() - started,
        "cpu_seconds": _cpu_of_children() - cpu_before,
        "read_bytes": seen.read_bytes,
        "peaks_seen": seen.peaks or None,
    }


def how_it_ended(code: int, rang: bool, timeout: float, said: Sequence[str]) -> str | None:
    """One line, or None where it went well.

    Args:
        rang: whether it was stopped for its time.
        said: the lines on its stderr.
    """
    if rang:
        return f"stopped after {timeout:.0f} s"
    if not code:
        return None
    # Linux kills a process that exhausts the memory with signal 9 and says nothing.
    out = " (out of memory?)" if code == -9 else ""
    return f"exit code {code}{out}: {said[-1] if said else 'no message'}"


def first_on_path() -> dict[str, str]:
    """`PYTHONPATH` with this checkout before the caller's: packages may be only there."""
    given = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *([given] if given else [])])}


def evict(folder: Path) -> int:
    """Drop a folder's weights from the page cache, so that they are read again; their bytes."""
    total = 0
    for path in sorted(folder.rglob("*.safetensors")):
        total += path.stat().st_size
        if hasattr(os, "posix_fadvise"):
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # pages that are not yet on the disk would stay
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return total


class _Watch:
    """Looks at a tree of processes until it ends, in a thread."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process, self._stop = process, threading.Event()
        self._why: str | None = None
        self.read_bytes: int | None = None  # from the disk, of all; None where it cannot be told
        self.peaks: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ended(self) -> str | None:
        """Stop looking. Why the process was killed from here; None where it was not."""
        self._stop.set()
        self._thread.join()
        return self._why

    def _run(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            try:
                self._look()
            except (OSError, LookupError, psutil.Error):
                continue  # one of them has just ended
            if psutil.virtual_memory().available < LEAST_FREE_BYTES:
                self._why = (
                    "stopped: the machine's memory was all but taken, "
                    f"{self.peaks.get('anonymous', 0) / 1e9:.1f} GB of it here"
                )
                _kill(self._process)
                return

    def _look(self) -> None:
        # What a process has read counts with its parent's as soon as that has waited for it:
        # parents are asked before their children, so that nothing counts twice.
        read = 0
        for pid in _tree(self._process.pid):
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
            fields = dict(line.split(":", 1) for line in status.splitlines())
            for kind, field in (
                ("anonymous", "RssAnon"), ("file", "RssFile"), ("resident", "VmRSS")
            ):  # fmt: skip
                amount = int(fields[field].split()[0]) * 1024
                self.peaks[kind] = max(self.peaks.get(kind, 0), amount)
            counters = Path(f"/proc/{pid}/io").read_text(encoding="utf-8")
            read += int(dict(line.split(": ") for line in counters.splitlines())["read_bytes"])
        self.read_bytes = max(read, self.read_bytes or 0)


def _tree(pid: int) -> Iterator[int]:
    """The process and all it started, parents before their children."""
    yield pid
    for child in psutil.Process(pid).children(recursive=True):
        yield child.pid


def _kill(process: "subprocess.Popen[str]") -> None:
    """End a process and all it started."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        children = []
    process.kill()
    for child in children:
        try:
            child.kill()
        except psutil.Error:
            continue


def _cpu_of_children() -> float:
    """Seconds on the CPU of all processes that were started here and have ended."""
    times = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)
