"""What is known of a machine: measured for real, remembered, and never taken from another one."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.files import user_cache
from lowvram.memory import capacity, disk, rates
from lowvram.memory.rates import Rates

FULL = Rates(2.5e9, "a disk", 12e9, {"float32": 1e12, "bfloat16": 2e12}, 400, 32, "2026-11-25")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No rates and no downloads but the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LOWVRAM_CACHE", str(folder))
    monkeypatch.setattr(disk, "hub_cache", lambda: tmp_path / "hub")
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure with a 256th of the bytes."""
    monkeypatch.setattr(disk, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(disk, "_WRITTEN_BYTES", 1 << 19)
    monkeypatch.setattr(disk, "_CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr(rates, "_CPU_SIDES", (64, 128))


def test_rates_survive_a_round_trip() -> None:
    for each in (FULL, rates.assumed("cpu"), rates.assumed("cuda"), rates.assumed("mps")):
        assert Rates.from_json(json.loads(json.dumps(each.to_json()))) == each
        rates.remember("cpu", each)
        assert rates.recall("cpu") == each


@pytest.mark.parametrize(
    "change",
    [
        {"disk_bytes_per_second": -1.0},
        {"disk_bytes_per_second": None},
        {"disk_bytes_per_second": float("nan")},
        {"transfer_bytes_per_second": "fast"},
        {"flops": [1.0]},
        {"flops": {"float32": 0.0}},
        {"flops": {"int3": 1.0}},
        {"flops": {"bfloat16": 1e12}},  # the rate of other dtypes falls back on float32's
        {"context_bytes": -5},
        {"cublas_bytes": 1.5},
        {"measured": 20261125},
        {"more": 1},
    ],
)
def test_odd_rates_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no rates"):
        Rates.from_json({**FULL.to_json(), **change})
    rates.remember("cpu", FULL)
    path = user_cache() / "rates.json"
    document = json.loads(path.read_text())
    document["rates"] = {key: {**each, **change} for key, each in document["rates"].items()}
    path.write_text(json.dumps(document))
    assert rates.recall("cpu") is None


def test_assumptions_are_cautious_and_say_so() -> None:
    for kind in ("cpu", "cuda", "xpu", "mps"):
        found = rates.assumed(kind)
        assert (found.measured, found.disk_source) == ("", "assumed")
        assert set(found.flops) == set(rates.DTYPES)
    assert rates.assumed("cpu").transfer_bytes_per_second is None
    assert rates.assumed("cuda").transfer_bytes_per_second == 12e9


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "7",
        '{"version": 1}',
        '{"version": 1, "rates": 3}',
        '{"other": {}}',
        "\0" * 99,
    ],
)
def test_a_damaged_or_foreign_file_is_not_used(content: str) -> None:
    path = user_cache() / "rates.json"
    path.parent.mkdir()
    path.write_text(content)
    assert rates.recall("cpu") is None
    rates.remember("cpu", FULL)
    assert rates.recall("cpu") == FULL


def test_a_newer_format_is_not_used() -> None:
    rates.remember("cpu", FULL)
    path = user_cache() / "rates.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "version": rates.FORMAT_VERSION + 1}))
    assert rates.recall("cpu") is None


@pytest.mark.parametrize("what", ["name", "driver", "torch"])
def test_another_card_driver_or_torch_is_another_entry(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates.remember("cpu", FULL)
    with monkeypatch.context() as other:
        if what == "name":
            other.setattr(rates, "device_name", lambda device: "another card")
        elif what == "driver":
            other.setattr(rates, "driver_version", lambda device: "999.1")
        else:
            other.setattr("importlib.metadata.version", lambda name: "99.0")
        assert rates.recall("cpu") is None
        rates.remember("cpu", replace(FULL, context_bytes=7))
    assert rates.recall("cpu") == FULL  # both are kept


def test_measuring_this_machine(small: None) -> None:
    found = rates.measure("cpu")
    assert 1e6 < found.disk_bytes_per_second < 1e12
    assert found.disk_source.startswith("1 MB of a temporary file")
    assert set(found.flops) == set(rates.DTYPES)
    assert all(1e6 < each < 1e15 for each in found.flops.values())
    assert found.transfer_bytes_per_second is found.context_bytes is found.cublas_bytes is None
    assert len(found.measured) == 10
    assert Rates.from_json(found.to_json()) == found


def test_a_dtype_that_a_device_lacks_is_left_out(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.mm

    def mm(a: torch.Tensor, b: torch.Tensor, **named: Any) -> torch.Tensor:
        if a.dtype == torch.float16:
            raise RuntimeError("not implemented for 'Half'")
        return real(a, b, **named)

    monkeypatch.setattr(torch, "mm", mm)
    assert set(rates.measure("cpu").flops) == {"float32", "bfloat16"}


@pytest.mark.parametrize("largest", [0, 1])
def test_a_device_without_room_for_large_matrices_still_has_a_rate(
    largest: int, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sides = torch.mm, []

    def mm(a: torch.Tensor, b: torch.Tensor, **named: Any) -> torch.Tensor:
        sides.append(len(a))
        if len({each for each in sides if each <= len(a)}) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(a, b, **named)

    monkeypatch.setattr(rates, "_CPU_SIDES", (8, 64))
    monkeypatch.setattr(torch, "mm", mm)
    found = rates.measure("cpu")
    assert Rates.from_json(found.to_json()) == found
    if largest == 0:
        assert found.flops == {"float32": rates.assumed("cpu").flops["float32"]}
    else:
        assert set(found.flops) == set(rates.DTYPES)


@pytest.mark.parametrize("place", ["hub/models--a--b/blobs/x", "cache/prepared/m/t/w.safetensors"])
def test_a_large_cached_file_is_read_rather_than_written(
    small: None, place: str, tmp_path: Path
) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(1 << 19))
    before = path.read_bytes()
    rate, source = disk.measure_disk()
    assert rate > 1e6
    assert source.startswith("1 MB of a file of the caches")
    assert path.read_bytes() == before
    path.write_bytes(bytes(100))  # too little to measure with
    assert disk.measure_disk()[1].startswith("1 MB of a temporary file")


@pytest.mark.parametrize("failing", [OSError("cannot read"), KeyboardInterrupt()])
def test_the_temporary_file_goes_also_when_reading_fails(
    failing: BaseException, small: None, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def fail(file: Any, what: str) -> tuple[float, str]:
        seen.append(os.fstat(file.fileno()).st_size)
        raise failing

    monkeypatch.setattr(disk, "_read_rate", fail)
    if isinstance(failing, OSError):
        assert disk.measure_disk() == (disk.ASSUMED, "assumed")
    else:
        with pytest.raises(KeyboardInterrupt):
            disk.measure_disk()
    assert seen == [1 << 19]
    assert list(own_cache.iterdir()) == []


def test_a_disk_without_room_is_assumed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert disk.measure_disk() == (disk.ASSUMED, "assumed")


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no such call here")
def test_what_is_in_memory_is_put_out_before_reading(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []
    evict: Callable[..., None] = lambda *arguments: calls.append(arguments[1:])  # noqa: E731
    monkeypatch.setattr(os, "posix_fadvise", evict)
    disk.measure_disk()
    assert calls == [(0, 1 << 20, os.POSIX_FADV_DONTNEED)]
    monkeypatch.delattr(os, "posix_fadvise")
    assert disk.measure_disk()[1].endswith("perhaps still in memory")


def test_the_least_counter_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda")

    def refuse(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("no such call\nhere")

    monkeypatch.setattr(capacity, "_mem_get_info", lambda device: (7, 8))
    monkeypatch.setattr(capacity, "_management", lambda device: (3, 8))
    monkeypatch.setattr(capacity, "_accelerator", refuse)
    assert capacity.free_bytes(card) == 3
    found = {each.name: (each.free, each.total, each.why) for each in capacity.count_device(card)}
    assert found == {
        "mem_get_info": (7, 8, ""),
        "nvml": (3, 8, ""),
        "torch.accelerator": (None, None, "no such call"),
    }
    assert capacity.free_bytes(torch.device("cpu")) is None
