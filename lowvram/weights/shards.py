"""The tensors of a safetensors checkpoint, one by one: read, converted on the way, or mapped.

Nothing is read before it is asked for, and no file stays open but those that are mapped. A file
that is shorter than its header says is refused here, so that no mapped page can be missing later.
"""

import json
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lowvram.errors import ModelError
from lowvram.files import weight_names
from lowvram.weights.tensor_files import DTYPES

_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_PIECE_BYTES = 1 << 20  # read at a time where values are converted: nothing beside a window
_WARM_BYTES = 1 << 20  # stays in the processor's cache, so that only the file is waited for


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `size` bytes from `start` of a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class Shards:
    """A component's tensors by name.

    Raises:
        ModelError: a file is missing, truncated or no safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for name in weight_names(folder):
            self.tensors |= _header(folder / name)
        if not self.tensors:
            raise ModelError(f"{folder} has no weights: download or prepare it again")

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor in memory of its own."""
        out = torch.empty(self.tensors[name].shape, dtype=dtype)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill a contiguous tensor on the CPU, of the same shape and any dtype.

        Raises:
            ModelError: the file ends too early. OSError: it cannot be read.
        """
        stored = self.tensors[name]
        with open(stored.path, "rb", buffering=0) as file:
            file.seek(stored.start)
            if out.dtype == stored.dtype:
                _fill(file, out, stored.path)
                return
            flat, at = out.view(-1), 0
            piece = torch.empty(
                min(flat.numel(), _PIECE_BYTES // stored.dtype.itemsize), dtype=stored.dtype
            )
            while at < flat.numel():
                part = piece[: flat.numel() - at]
                _fill(file, part, stored.path)
                flat[at : at + part.numel()].copy_(part)
                at += part.numel()

    def rows(self, name: str, indices: Iterable[int], dtype: torch.dtype) -> Tensor:
        """Single rows of a matrix, `[indices, columns]`: an embedding table need not be loaded."""
        stored = self.tensors[name]
        _, columns = stored.shape
        wanted = list(indices)
        out = torch.empty((len(wanted), columns), dtype=stored.dtype)
        width = columns * stored.dtype.itemsize
        with open(stored.path, "rb", buffering=0) as file:
            for row, index in zip(out, wanted, strict=True):
                file.seek(stored.start + index * width)
                _fill(file, row, stored.path)
        return out.to(dtype)

    def view(self, name: str) -> Tensor:
        """A tensor that is the mapped file itself; its pages are read when they are touched."""
        stored = self.tensors[name]
        mapped = self._map(stored.path)
        count = stored.size // stored.dtype.itemsize
        flat = torch.frombuffer(mapped, dtype=stored.dtype, count=count, offset=stored.start)
        return flat.view(stored.shape)

    def placeholder(self, name: str, dtype: torch.dtype) -> nn.Parameter:
        """Shape and dtype without memory: some forwards look at the dtype of weights to come."""
        empty = torch.empty(self.tensors[name].shape, dtype=dtype, device="meta")
        return nn.Parameter(empty, requires_grad=False)

    def warm(self, name: str) -> None:
        """Read a tensor's bytes into the page cache, where a failing disk is still an OSError."""
        stored, scratch = self.tensors[name], bytearray(_WARM_BYTES)
        left = stored.size
        with open(stored.path, "rb", buffering=0) as file:
            file.seek(stored.start)
            while left > 0:
                got = file.readinto(memoryview(scratch)[: min(left, _WARM_BYTES)])
                if not got:
                    raise _truncated(stored.path)
                left -= got

    def drop(self, names: Iterable[str]) -> None:
        """Let go of the mapped pages of tensors; the page cache keeps what it has room for."""
        if not hasattr(mmap, "MADV_DONTNEED"):  # Windows trims the working set by itself
            return
        for name in names:
            stored = self.tensors[name]
            first = -(-stored.start // mmap.PAGESIZE) * mmap.PAGESIZE
            size = (stored.start + stored.size - first) // mmap.PAGESIZE * mmap.PAGESIZE
            if size > 0:
                self._map(stored.path).madvise(mmap.MADV_DONTNEED, first, size)

    def close(self) -> None:
        """Forget the mappings; each ends when its last tensor does."""
        self._maps.clear()

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with open(path, "rb") as file:
                # ACCESS_COPY, because torch warns of memory that may not be written
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]


def _header(path: Path) -> dict[str, Stored]:
    """Every tensor of a file."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise _truncated(path)
            listing = json.loads(file.read(length))
        found = {}
        for name, entry in listing.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if 8 + length + end > size:
                raise _truncated(path)
            found[name] = Stored(
                path,
                _DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                8 + length + begin,
                end - begin,
            )
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror}): download or prepare it again"
        ) from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{path} is no safetensors file: download or prepare it again") from None
    return found


def _fill(file: "object", out: Tensor, path: Path) -> None:
    """Read exactly as many bytes as a contiguous tensor has."""
    view = memoryview(out.view(-1).view(torch.uint8).numpy().data)
    while view:
        got = file.readinto(view)  # type: ignore[attr-defined]
        if not got:
            raise _truncated(path)
        view = view[got:]


def _truncated(path: Path) -> ModelError:
    return ModelError(f"{path} is truncated: download or prepare it again")
