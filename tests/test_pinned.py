"""Page-locked memory: exactly what is asked for, and nothing stays locked."""

import errno
import logging
import mmap
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowvram.memory.pinned import PinnedMemory
from lowvram.pixels.feature_maps import Pinned
from lowvram.weights.lanes import CopyingLane

PAGE = 4096


class Driver:
    """What is registered with CUDA, which refuses memory beyond `limit`."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.locked: dict[int, int] = {}
        self.limit = limit

    def register(self, address: int, size: int, flags: int) -> int:
        assert address % PAGE == 0
        assert address not in self.locked
        if sum(self.locked.values()) + size > self.limit:
            return 2  # cudaErrorMemoryAllocation
        self.locked[address] = size
        return 0

    def unregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    calls = SimpleNamespace(cudaHostRegister=made.register, cudaHostUnregister=made.unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: calls)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    # the failure that CUDA repeats, see `PinnedMemory`
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return made


def test_sizes_are_not_rounded(driver: Driver) -> None:
    memory = PinnedMemory(torch.device("cuda"))
    lent = [memory.empty(size) for size in (42_500_000, 3, 1)]
    assert [each.nbytes for each in lent] == [42_500_000, 3, 1]
    assert sum(driver.locked.values()) == 42_500_004
    lent[0].fill_(7)
    memory.free(lent[1])
    assert sum(driver.locked.values()) == 42_500_001
    memory.close()
    assert driver.locked == {}
    assert int(lent[0][-1]) == 7  # still there


def test_where_nothing_can_be_locked_memory_is_ordinary(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    driver.limit = 100
    memory = PinnedMemory(torch.device("cpu"))
    small, large = memory.empty(100), memory.empty(1000)
    assert list(driver.locked) == [small.data_ptr()]
    large.fill_(1)
    assert [(r.levelno, r.getMessage()) for r in caplog.records if "pin" in r.getMessage()] == [
        (logging.WARNING, "cannot pin 0.00 GB of memory (CUDA error 2): copies will wait")
    ]
    memory.free(large)
    memory.close()
    assert driver.locked == {}


def test_no_memory_at_all_is_an_out_of_memory_and_leaves_nothing(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = mmap.mmap, []

    def once(*given: Any, **named: Any) -> mmap.mmap:
        if made:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        made.append(real(*given, **named))
        return made[0]

    monkeypatch.setattr("lowvram.memory.pinned.mmap.mmap", once)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda size, **named: torch.zeros(size))
    units: Any = [SimpleNamespace(size=100)]
    shards: Any = None
    with pytest.raises(MemoryError, match=r"of host memory: Cannot allocate memory"):
        CopyingLane(shards, units, 2, torch.device("cuda"), keep=False)
    assert made and driver.locked == {}


def test_maps_lend_the_same_memory_again(driver: Driver) -> None:
    with Pinned().open() as store:
        first = store.empty((4, 1024), torch.float16)
        place = first.data_ptr()
        store.free(first)
        second = store.empty((2, 1024), torch.float16)
        assert second.data_ptr() == place
        third = store.empty((1024,), torch.float32)
        assert len(driver.locked) == 2
        store.free(third)
        store.empty((8192,), torch.float32)  # in place of what is free and too small
        assert sorted(driver.locked.values()) == [8192, 32768]
    assert driver.locked == {}
