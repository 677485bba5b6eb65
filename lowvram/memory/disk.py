"""How fast the disk of the caches gives a large file that is not in memory."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lowvram.files import hub_cache, user_cache

ASSUMED = 0.5e9  # bytes a second: SATA 3 carries 0.6e9; NVMe on PCIe 3 x4 gives 3.5e9

_READ_BYTES = 256 << 20
_READ_SECONDS = 1.0
_WRITTEN_BYTES = 128 << 20  # of the temporary file, and the least file that is worth reading
_CHUNK_BYTES = 8 << 20


def measure_disk() -> tuple[float, str]:
    """Bytes a second, and what was read: a large file of the caches, else one written for it.

    "assumed" where neither can be read. On a system that cannot put a file out of its memory
    (Windows, macOS) the source says so, and the number may be that of memory.
    """
    try:
        largest = max(_cached_files(), key=lambda path: path.stat().st_size, default=None)
        if largest is not None and largest.stat().st_size >= _WRITTEN_BYTES:
            with open(largest, "rb", buffering=0) as file:
                return _read_rate(file, "a file of the caches")
    except OSError:  # it went away, or may not be read
        pass
    try:
        user_cache().mkdir(parents=True, exist_ok=True)
        # It has no name, or loses it with the process: nothing stays behind, whatever happens.
        with tempfile.TemporaryFile(dir=user_cache(), buffering=0) as file:
            chunk = os.urandom(_CHUNK_BYTES)  # some file systems compress
            for _ in range(_WRITTEN_BYTES // _CHUNK_BYTES):
                file.write(chunk)
            os.fsync(file.fileno())
            return _read_rate(file, "a temporary file")
    except OSError:  # a full disk, or a cache that cannot be written
        return ASSUMED, "assumed"


def _cached_files() -> Iterator[Path]:
    """Downloads and what was prepared, each file once."""
    yield from hub_cache().glob("*/blobs/*")
    yield from user_cache().glob("prepared/*/*/*.safetensors")


def _read_rate(file: IO[bytes], what: str) -> tuple[float, str]:
    """Read from the start, for a second at most, past what the system keeps in memory."""
    evicted = hasattr(os, "posix_fadvise")
    if evicted:
        os.posix_fadvise(file.fileno(), 0, _READ_BYTES, os.POSIX_FADV_DONTNEED)
    file.seek(0)
    buffer, done = memoryview(bytearray(_CHUNK_BYTES)), 0
    start = time.perf_counter()
    while done < _READ_BYTES and time.perf_counter() - start < _READ_SECONDS:
        got = file.readinto(buffer)  # type: ignore[attr-defined]
        if not got:
            break
        done += got
    seconds = time.perf_counter() - start
    if not done:
        raise OSError("nothing could be read")
    source = f"{done / 1e6:.0f} MB of {what}"
    return done / seconds, source if evicted else f"{source}, perhaps still in memory"
