"""Counting live bytes, on real tensors and on fake ones."""

import torch

from lowvram.memory.count import LiveBytes, fake_device


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
