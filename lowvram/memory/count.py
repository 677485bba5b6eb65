"""Counts the bytes of live tensors on one device: what an allocator would have to hold.

Works on real tensors and on fake ones (`FakeTensorMode`), so that a peak is known without a GPU and
without computing. Under fake tensors the device "meta" stands for a GPU: it is another device than
the host's "cpu", and code that stages between the two runs as it is.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """A context in which new tensors on a device are counted, each storage once, while it lives.

    Attributes:
        now, peak: bytes of the storages that live now, and the most there were at once.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}  # a storage's address to its bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, then count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor; those made outside of the context are counted only by this."""
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._seen.pop(key)


@contextmanager
def fake_device() -> Iterator[torch.device]:
    """A context of fake tensors with a device of its own, beside the host's "cpu"."""
    from torch._functorch import config
    from torch._subclasses.fake_tensor import FakeTensorMode

    with config.patch(fake_tensor_allow_meta=True), FakeTensorMode():
        yield torch.device("meta")
