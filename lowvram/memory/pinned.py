"""Page-locked memory of the host, from and to which a CUDA device copies while it computes.

torch's own pinned allocator rounds to powers of two and keeps what is freed: up to twice the
memory, locked for the rest of the process. Here ordinary memory is registered with CUDA.
"""

import logging
import mmap
import sys
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_FOR_EVERY_DEVICE = 1  # cudaHostRegisterPortable
# Ordinary memory, where Python's default is shared memory; Windows knows one kind only.
_PRIVATE: dict[str, Any] = (
    {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
)


class PinnedMemory:
    """Lends memory whose pages are locked until it is closed.

    Where the system does not allow that much (WSL2, a limit), memory is ordinary: copies are then
    slower, and right.
    """

    def __init__(self, device: torch.device) -> None:
        """`device`: a CUDA device, whose context is there already."""
        self._device = device
        self._locked: dict[int, Tensor] = {}  # by address

    def empty(self, size: int) -> Tensor:
        """`[size]` bytes with undefined values; locking touches every page.

        Raises:
            MemoryError: the host has not as much.
        """
        # Anonymous mappings begin at a page of their own: two never share one.
        try:
            mapped = mmap.mmap(-1, max(1, size), **_PRIVATE)
        except OSError as error:
            raise MemoryError(f"{size / 1e9:.2f} GB of host memory: {error.strerror}") from None
        memory = torch.frombuffer(mapped, dtype=torch.uint8)
        with torch.cuda.device(self._device):
            if self._lock(memory):
                self._locked[memory.data_ptr()] = memory
        return memory[:size]

    def free(self, memory: Tensor) -> None:
        """Unlock what was lent; no copy of it may be under way."""
        if self._locked.pop(memory.data_ptr(), None) is not None:
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def close(self) -> None:
        """Unlock all; no copy may be under way."""
        for memory in list(self._locked.values()):
            self.free(memory)

    def _lock(self, memory: Tensor) -> bool:
        code = int(
            torch.cuda.cudart().cudaHostRegister(
                memory.data_ptr(), memory.nbytes, _FOR_EVERY_DEVICE
            )
        )
        if code == 0:
            return True
        log.warning(
            "cannot pin %.2f GB of memory (CUDA error %d): copies will wait",
            memory.nbytes / 1e9,
            code,
        )
        try:  # CUDA reports the failure once more at the next kernel: let that be this one
            torch.zeros(1, device=self._device).add_(1)
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            log.debug("CUDA repeated the failure")
        return False
