"""Where feature maps live between the passes of a strip decode: in RAM, pinned, or on disk.

A place is a frozen value; `open()` lends a store from it, and when that ends, however it ends,
no pinned memory and no file is left.
"""

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import torch
from torch import Tensor

from lowvram.errors import storage_error
from lowvram.memory.host import available_bytes
from lowvram.memory.pinned import PinnedMemory

# RAM that other programs, and what is not a map, may still need when maps go to RAM.
MARGIN_BYTES = 1 << 30
_BLOCK = bytes(1 << 20)


class Store:
    """Lends maps in RAM; other stores differ in where the memory comes from."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A map with undefined values."""
        return torch.empty(shape, dtype=dtype)

    def free(self, lent: Tensor) -> None:
        """Take a map back; its owner drops it too."""


class Place(Protocol):
    """Where maps live."""

    @contextmanager
    def open(self) -> Iterator[Store]:
        """A store for one picture."""
        yield Store()


@dataclass(frozen=True)
class InRam:
    """Ordinary memory."""

    def __str__(self) -> str:
        return "maps in RAM"

    @contextmanager
    def open(self) -> Iterator[Store]:
        """Maps go with their last reference."""
        yield Store()


@dataclass(frozen=True)
class Pinned:
    """Page-locked memory, from which a CUDA device copies while it computes."""

    def __str__(self) -> str:
        return "maps in pinned memory"

    @contextmanager
    def open(self) -> Iterator[Store]:
        """All pages are unlocked at the end."""
        store = _PinnedStore()
        try:
            yield store
        finally:
            store.close()


@dataclass(frozen=True)
class OnDisk:
    """Mapped temporary files in a folder, for when RAM is short.

    Attributes:
        folder: on a disk, not a RAM file system; None for the system's temporary folder.
    """

    folder: Path | None = None

    def __str__(self) -> str:
        return "maps on disk"

    @contextmanager
    def open(self) -> Iterator[Store]:
        """The files have no name, and their space is free when the last map is dropped.

        Raises:
            StorageError: from `empty`, when the folder cannot be written or its disk is full.
        """
        yield _DiskStore(self.folder)


def choose_place(needed_bytes: int, device_type: str, folder: Path | None = None) -> Place:
    """RAM (pinned where the device is CUDA) if the maps fit what is available, else the disk.

    Args:
        needed_bytes: of the maps that live at once (`strips.maps_bytes`).
        folder: for temporary files; None for the system's.
    """
    if needed_bytes > available_bytes() - MARGIN_BYTES:
        return OnDisk(folder)
    return Pinned() if device_type == "cuda" else InRam()


class _PinnedStore(Store):
    """Locking touches every page, so memory that comes back is lent again where it is enough."""

    def __init__(self) -> None:
        self._memory = PinnedMemory(torch.device("cuda"))
        self._lent: dict[int, Tensor] = {}  # by address
        self._free: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The smallest free memory that suffices, or new memory in place of all that is free."""
        size = torch.Size(shape).numel() * dtype.itemsize
        enough = [index for index, memory in enumerate(self._free) if memory.nbytes >= size]
        if enough:
            memory = self._free.pop(min(enough, key=lambda index: self._free[index].nbytes))
        else:
            while self._free:
                self._memory.free(self._free.pop())
            memory = self._memory.empty(size)
        self._lent[memory.data_ptr()] = memory
        return memory[:size].view(dtype).view(shape)

    def free(self, lent: Tensor) -> None:
        """Lend it again to the next that fits."""
        self._free.append(self._lent.pop(lent.data_ptr()))

    def close(self) -> None:
        """Unlock all pages; no copy may be under way."""
        self._lent.clear()
        self._free.clear()
        self._memory.close()


class _DiskStore(Store):
    """One nameless file for each map."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder or Path(tempfile.gettempdir())

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A mapped file.

        Raises:
            StorageError: no space, or the folder cannot be written.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        try:
            # Nameless from the start, or on systems without that deleted when it is closed.
            with tempfile.TemporaryFile(dir=self._folder) as file:
                _allocate(file, size)
                mapped = mmap.mmap(file.fileno(), size)  # keeps the file open for itself
        except OSError as error:
            free = shutil.disk_usage(self._folder).free if self._folder.is_dir() else 0
            error.filename = f"{size / 1e9:.2f} GB to {self._folder} ({free / 1e9:.2f} GB free)"
            raise storage_error(error, "decode in strips") from None
        return torch.frombuffer(mapped, dtype=dtype).view(shape)


def _allocate(file: IO[bytes], size: int) -> None:
    """Take the space now: a full disk is an error here, and would be a SIGBUS in a mapped page."""
    if hasattr(os, "posix_fallocate"):  # Linux
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, len(_BLOCK)):
        file.write(_BLOCK[: size - start])
    file.flush()
