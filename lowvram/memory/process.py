"""The counters of this process: resident memory, its peak, and bytes read from disk."""

import ctypes
import os
import sys
import weakref

from lowvram.memory.counters import Known, or_none

_PAGE_BYTES = os.sysconf("SC_PAGESIZE") if hasattr(os, "sysconf") else 0


def process_counters() -> "ProcessCounters":
    """The counters of the system that this is."""
    return _Linux() if sys.platform == "linux" else ProcessCounters()


class ProcessCounters:
    """What the system tells of this process."""

    def __init__(self) -> None:
        self._read_before = self._read()

    def rss_bytes(self) -> int:
        """Resident memory now."""
        import psutil

        return int(psutil.Process().memory_info().rss)

    def disk_read_bytes(self) -> Known:
        """Bytes read since this was made.

        On Linux those that a disk had to give (`read_bytes` of /proc/self/io): mapped files count,
        what the page cache still held does not. Not `rchar`, which is 0 for mapped files, and most
        weights are mapped. Windows counts every read call; macOS tells nothing.
        """
        now = self._read()
        return None if now is None or self._read_before is None else now - self._read_before

    def _read(self) -> Known:
        import psutil

        counters = getattr(psutil.Process(), "io_counters", None)
        return None if counters is None else or_none(lambda: int(counters().read_bytes))


class _Linux(ProcessCounters):
    def __init__(self) -> None:
        self._memory = _ProcFile("/proc/self/statm")
        self._io = or_none(lambda: _ProcFile("/proc/self/io"))  # not allowed in some containers
        super().__init__()

    def rss_bytes(self) -> int:
        return int(self._memory.read().split()[1]) * _PAGE_BYTES

    def _read(self) -> Known:
        if self._io is None:
            return None
        _, _, rest = self._io.read().partition(b"\nread_bytes: ")
        return int(rest.partition(b"\n")[0])


class _ProcFile:
    """A file of /proc, which says something new each time it is read.

    Read without giving up the interpreter: a thread that gives it up has to wait for it again, and
    on a busy machine the work then waits for that thread, longer than the 2 µs that this takes.
    """

    def __init__(self, path: str) -> None:
        """Raises OSError: there is none, or it must not be read."""
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._buffer = ctypes.create_string_buffer(1024)
        self._pread = ctypes.PyDLL(None).pread
        self._pread.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long)
        self._pread.restype = ctypes.c_ssize_t

    def read(self) -> bytes:
        """All of it."""
        size = self._pread(self._descriptor, self._buffer, len(self._buffer), 0)
        return self._buffer.raw[: max(0, size)]


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


def reset_peak_rss() -> None:
    """Linux only; elsewhere the peak is that of the process's life."""
    if sys.platform == "linux":
        try:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")
        except OSError:  # not allowed in some containers: the peak is then that of the process
            return
