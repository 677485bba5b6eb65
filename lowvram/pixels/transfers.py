"""Strips between the host's maps and a device: first started, first taken.

Elsewhere than on CUDA a copy is made when it is taken; on the CPU there is none. On CUDA copies run
on streams of their own beside the computation: the strip after the next is on its way while one
computes.
"""

from collections import deque
from types import TracebackType
from typing import Self

import torch
from torch import Tensor


class Transfers:
    """Plain copies, for every device but CUDA; as a context it ends with no copy under way."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._coming: deque[Tensor] = deque()

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device already, as everything is on the CPU."""
        return tensor.device.type == self.device.type

    def start(self, strip: Tensor) -> None:
        """Ask for a part of a host map, one contiguous block, on the device."""
        self._coming.append(strip)

    def take(self) -> Tensor:
        """The strip that was asked for first; on the CPU a view of its map."""
        return self._coming.popleft().to(self.device)

    def write(self, strip: Tensor, computed: Tensor) -> None:
        """Copy what was computed into a part of a host map; on a device it is made one block."""
        strip.copy_(computed if self.device.type == "cpu" else computed.contiguous())

    def finish(self) -> None:
        """Wait until all is written and forget what was asked for and not taken."""
        self._coming.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish()


class CudaTransfers(Transfers):
    """Copies beside the computation.

    Every device tensor comes from the computing stream's memory, and the computing stream waits for
    a copy before it uses or gives up its tensor. So memory is reused in the order of that stream:
    no more than what is counted lives at once, however far the host runs ahead. Tested with streams
    that copy as late as they may (`tests/test_transfers.py`).
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._computing = torch.cuda.current_stream(device)
        self._in = torch.cuda.Stream(device)
        self._out = torch.cuda.Stream(device)
        self._started: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._written: tuple[Tensor, torch.cuda.Event] | None = None

    def start(self, strip: Tensor) -> None:
        """Begin the copy as soon as what was computed so far is done with the memory it gets."""
        tensor = torch.empty(strip.shape, dtype=strip.dtype, device=self.device)
        self._in.wait_stream(self._computing)
        with torch.cuda.stream(self._in):
            tensor.copy_(strip, non_blocking=True)
        self._started.append((tensor, self._in.record_event()))

    def take(self) -> Tensor:
        """What computes from now on waits for the strip; the host does not."""
        tensor, copied = self._started.popleft()
        self._computing.wait_event(copied)
        return tensor

    def write(self, strip: Tensor, computed: Tensor) -> None:
        """Begin the copy when it is computed; the one before ends first and gives up its memory."""
        computed = computed.contiguous()
        self._out.wait_stream(self._computing)
        with torch.cuda.stream(self._out):
            strip.copy_(computed, non_blocking=True)
        previous, self._written = self._written, (computed, self._out.record_event())
        if previous is not None:
            self._computing.wait_event(previous[1])

    def finish(self) -> None:
        """Wait for all three streams, so that the host may read, free or unpin its maps. The next
        pass has strips of other sizes: it finds no memory cut up for those of this one.
        """
        for stream in (self._computing, self._in, self._out):
            stream.synchronize()
        self._started.clear()
        self._written = None
        torch.cuda.empty_cache()


class RehearsedTransfers(Transfers):
    """Holds what `CudaTransfers` holds, when it holds it, and copies nothing."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._written: Tensor | None = None

    def start(self, strip: Tensor) -> None:
        """Memory for the strip."""
        self._coming.append(torch.empty(strip.shape, dtype=strip.dtype, device=self.device))

    def take(self) -> Tensor:
        """Memory that was asked for."""
        return self._coming.popleft()

    def write(self, strip: Tensor, computed: Tensor) -> None:
        """Keep what was computed until the next is written."""
        self._written = computed.contiguous()

    def finish(self) -> None:
        """Give all memory up."""
        super().finish()
        self._written = None


def transfers_for(device: torch.device) -> Transfers:
    """Copies beside the computation on CUDA, plain ones elsewhere."""
    return CudaTransfers(device) if device.type == "cuda" else Transfers(device)
