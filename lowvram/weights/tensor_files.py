"""Safetensors files written and checked piece by piece: never a whole model in memory.

The library's own writer takes all tensors at once. Here the header is known first and the values
follow as they are made. Knows neither families nor quantisation.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

_ALIGNMENT = 8  # bytes; of the largest type above
_CHUNK_BYTES = 1 << 24


class DamagedFileError(Exception):
    """What lies on the disk is not what was written; names the tensor."""


@dataclass(frozen=True)
class Spec:
    """A tensor as a file's header has it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_odd(spec: Spec) -> bool:
    """Whether what follows it would lie at an address that its type cannot be read from."""
    return spec.bytes % _ALIGNMENT != 0


def in_file_order(specs: Sequence[Spec]) -> list[Spec]:
    """As given, but what would misalign the rest comes last, the widest types first.

    The format allows no gaps. bitsandbytes describes each 4-bit matrix in a tensor of 78 or 79
    bytes, after which torch could not view bfloat16 in the mapped file.
    """
    return sorted(specs, key=lambda spec: (is_odd(spec), is_odd(spec) * -spec.dtype.itemsize))


def write_file(path: Path, specs: Sequence[Spec], pieces: Iterable[Tensor]) -> None:
    """Write a file and see it onto the disk.

    Args:
        specs: in the order of the file.
        pieces: their values in that order, in their dtypes, cut as is convenient.

    Raises:
        OSError: it cannot be written.
        ValueError: the pieces are not as long as the specs say.
    """
    missing = sum(spec.bytes for spec in specs)
    with open(path, "wb") as file:
        file.write(header(specs))
        for piece in pieces:
            missing -= file.write(_bytes_of(piece))
        if missing:
            raise ValueError(f"{path.name}: the values are {-missing} bytes longer than planned")
        file.flush()
        os.fsync(file.fileno())


def verify_file(path: Path, specs: Sequence[Spec], pieces: Iterable[Tensor]) -> str:
    """Read a file back from the disk and compare it with values made anew.

    Args:
        specs, pieces: as for `write_file`.

    Returns:
        the sha256 of the file.

    Raises:
        DamagedFileError: names the first tensor that differs.
    """
    digest = hashlib.sha256()
    ends = _ends(specs)
    position = 0
    with open(path, "rb") as file:
        _forget_cached(file.fileno())
        found = file.read(len(header(specs)))
        if found != header(specs):
            raise DamagedFileError("its header")
        digest.update(found)
        for piece in pieces:
            wanted = _bytes_of(piece)
            for start in range(0, len(wanted), _CHUNK_BYTES):
                chunk = file.read(len(wanted[start : start + _CHUNK_BYTES]))
                if chunk != bytes(wanted[start : start + _CHUNK_BYTES]):
                    name = next(n for n, end in ends if position + start < end)
                    raise DamagedFileError(name)
                digest.update(chunk)
            position += len(wanted)
        if file.read(1) or position != sum(spec.bytes for spec in specs):
            raise DamagedFileError("its length")
    return digest.hexdigest()


def header(specs: Sequence[Spec]) -> bytes:
    """What the values of a file follow."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        offsets = [end, end := end + spec.bytes]
        described[spec.name] = {
            "dtype": DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _ends(specs: Sequence[Spec]) -> list[tuple[str, int]]:
    """Where each tensor ends, counted from the first value."""
    return list(zip([s.name for s in specs], accumulate(s.bytes for s in specs), strict=True))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().data


def _forget_cached(descriptor: int) -> None:
    """Have what is read next come from the disk and not from memory, where the system can."""
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
