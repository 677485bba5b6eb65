"""Counts the bytes of live tensors on one device: what an allocator would have to hold.

Works on real tensors and on fake ones (`FakeTensorMode`), so that a peak is known without a GPU and
without computing. Under fake tensors the device "meta" stands for a GPU: it is another device than
the host's "cpu", and code that stages between the two runs as it is.
"""

import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowvram.interrupts import interrupts_held


class LiveBytes(TorchDispatchMode):
    """A context in which new tensors on a device are counted, each storage once, while it lives.

    Attributes:
        peak: bytes of the storages that lived at once, at most.
    """

    def __init__(self, device_type: str, now: int = 0, limit: int | None = None) -> None:
        """`now`: bytes that are there already. `limit`: of bytes at once; None for no limit."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.peak = self._now = now
        self.limit = limit
        self._seen: dict[int, tuple[int, _Storage]] = {}  # a storage's address to its bytes
        # Only C runs as a storage goes: an exception there, as of Ctrl-C, would be lost.
        self._gone: deque[_Storage] = deque()
        self._settling = threading.Lock()  # a meter's thread looks, too

    @property
    def now(self) -> int:
        """Bytes of the storages that live now."""
        self.settle()
        return self._now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, then count what it made.

        Raises:
            MemoryError: more than the limit is there now.
        """
        result = func(*args, **(kwargs or {}))
        leaves = result if type(result) in (tuple, list) else (result,)
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.device.type == self.device_type:
                self._count(leaf, args if _may_alias(func) else ())
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor; those made outside of the context are counted only by this."""
        if tensor.device.type == self.device_type:
            self._count(tensor, ())

    def _count(self, tensor: Tensor, inputs: Iterable[Any]) -> None:
        """`inputs`: of what the tensor may be a view; views of what is not counted are not."""
        self.settle()
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen or any(
            isinstance(each, Tensor) and each.untyped_storage()._cdata == key
            for each in tree_leaves(inputs)
        ):
            return
        size, reference = storage.nbytes(), _Storage(storage, self._gone.append)
        reference.key = key
        with self._settling:
            self._seen[key] = size, reference
            self._now += size
        self.changed(key, size)
        self.peak = max(self.peak, self.now)
        if self.limit is not None and self.now > self.limit:
            raise MemoryError(
                f"{self.now / 1e6:,.2f} MB of tensors, and {self.limit / 1e6:,.2f} MB are allowed"
            )

    def changed(self, key: int, size: int) -> None:
        """A storage came with so many bytes, or went (negative). For those who want to know."""

    def settle(self) -> None:
        """Take off what has gone."""
        with self._settling:
            while self._gone:
                key = self._gone.popleft().key
                size, _ = self._seen.pop(key)
                self._now -= size
                self.changed(key, -size)


class _Storage(weakref.ref[torch.UntypedStorage]):
    """One that may have gone, and its address."""

    __slots__ = ("key",)
    key: int


@cache
def _may_alias(func: Any) -> bool:
    return any(value.alias_info is not None for value in func._schema.returns)


@contextmanager
def fake_device() -> Iterator[torch.device]:
    """A context of fake tensors with a device of its own, beside the host's "cpu"."""
    from torch._functorch import config
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Ctrl-C inside of torch's switching of modes would leave them switched.
    with (
        interrupts_held(),
        config.patch(fake_tensor_allow_meta=True),
        FakeTensorMode(),
        _Constants(),
    ):
        yield torch.device("meta")


class _Constants(TorchFunctionMode):
    """Makes `torch.tensor(...)` on the host and moves it: on "meta" it is no fake tensor in
    inference mode, and what meets it fails (T5's mask in transformers 5.10)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(device)
        return func(*args, **kwargs)
