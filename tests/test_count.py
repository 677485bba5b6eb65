"""Counting live bytes, on real tensors and on fake ones."""

import signal
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lowvram.memory.count import LiveBytes, fake_device
from lowvram.memory.predict import trace


def test_each_storage_counts_once_while_it_lives() -> None:
    with LiveBytes("cpu") as live:
        a = torch.empty(1000, dtype=torch.float16)
        view = a[10:].view(-1, 10)
        assert (live.now, live.peak) == (2000, 2000)
        b = a + 1
        assert live.now == 4000
        del a
        assert live.now == 4000  # the view still holds it
        del view
        assert live.now == 2000
        del b
    assert (live.now, live.peak) == (0, 4000)


def test_tensors_made_before_count_when_added() -> None:
    before = torch.empty(500, dtype=torch.uint8)
    with LiveBytes("cpu") as live:
        live.add(before)
        live.add(before[5:])
        assert live.now == 500


def test_the_fake_device_is_not_the_host() -> None:
    with fake_device() as device, LiveBytes(device.type) as live:
        host = torch.empty(1 << 40, dtype=torch.uint8)  # a terabyte that nobody allocates
        assert live.now == 0
        on_device = host[: 1 << 20].to(device)
        assert live.now == 1 << 20
        host[: 1 << 20].copy_(on_device)
        assert live.peak == 1 << 20


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler also where tests run in the background, with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_as_a_tensor_goes_is_not_lost() -> None:
    """Python's signals are raised in Python's code: there is none where exceptions are lost."""
    lost: list[object] = []

    class Interrupting(LiveBytes):
        def changed(self, key: int, size: int) -> None:
            if size < 0:
                signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.unraisablehook", lost.append)
        with pytest.raises(KeyboardInterrupt), Interrupting("cpu"):
            tensor = torch.empty(10)
            del tensor
            torch.empty(10)
    assert lost == []


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_of_a_trace_comes_when_it_ends() -> None:
    ended = []

    def work(network: nn.Module, device: torch.device) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        made: torch.Tensor = network(torch.empty(1, 4, device=device))
        ended.append(made.shape)
        return made

    with pytest.raises(KeyboardInterrupt):
        trace(nn.Linear(4, 4, device="meta"), work)
    assert ended == [(1, 4)]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
