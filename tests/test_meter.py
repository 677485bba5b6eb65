"""The meter: its thread ends, thinning loses no peak, what stays behind is named."""

import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lowvram
from lowvram import component
from lowvram.memory.count import LiveBytes
from lowvram.memory.leftovers import left_tensors, tensors_on
from lowvram.memory.meter import Meter
from lowvram.memory.plan import Room
from lowvram.memory.process import process_counters
from lowvram.memory.timeline import COLUMNS, Marks, Sampler, Timeline, most
from lowvram.weights.checkpoint import Loaded
from lowvram.weights.whole import Whole

CPU = torch.device("cpu")


def sampling() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "lowvram-meter"]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert sampling() == []


def test_it_samples_while_the_work_runs_and_then_ends() -> None:
    with Meter(CPU, interval_seconds=0.001) as meter:
        assert len(sampling()) == 1
        deadline = time.monotonic() + 60
        while len(meter.timeline.rows) < 5 and time.monotonic() < deadline:
            time.sleep(0.001)
    assert sampling() == []
    assert len(meter.timeline.rows) >= 5
    seconds = [row[0] for row in meter.timeline.rows]
    assert seconds == sorted(seconds)
    assert all(row[COLUMNS.index("rss_bytes")] > 50e6 for row in meter.timeline.rows)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_it_ends_when_the_work_raises(error: type[BaseException]) -> None:
    with pytest.raises(error), Meter(CPU) as meter, meter.phase("compute"):
        assert len(sampling()) == 1
        raise error
    assert sampling() == []
    assert [name for _, name in meter.over_time()["marks"]] == ["compute"]


def test_no_thread_without_a_context() -> None:
    Meter(CPU).sample()
    assert sampling() == []


def test_a_failing_look_ends_sampling_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError("no such counter")

    sampler = Sampler(fail, lambda: 0.0)
    sampler.start()
    deadline = time.monotonic() + 60
    while sampling() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert sampling() == []
    sampler.stop()
    assert "no longer sampled (no such counter)" in caplog.text


def test_expensive_looks_are_taken_less_often() -> None:
    sampler = Sampler(lambda: None, lambda: 0.05)
    assert sampler._pause() == 0.05
    sampler.looks, sampler.busy_seconds = 10, 0.1
    assert sampler._pause() == pytest.approx(1)


@given(st.lists(st.one_of(st.none(), st.integers(0, 1 << 40)), min_size=1, max_size=300))
def test_thinning_keeps_maxima_and_order(values: list[int | None]) -> None:
    timeline = Timeline(most_rows=8)
    for index, value in enumerate(values):
        timeline.add((float(index), value))
    assert len(timeline.rows) <= 8
    known = [value for value in values if value is not None]
    assert most(timeline.rows)[1] == (max(known) if known else None)
    seconds = [row[0] for row in timeline.rows]
    assert seconds == sorted(set(seconds))
    assert seconds[-1] == len(values) - 1


def test_the_interval_stretches_with_the_rows() -> None:
    timeline = Timeline(most_rows=8)
    strides = []
    for index in range(33):
        timeline.add((float(index), 0))
        strides.append(timeline.stride)
    assert (strides[7], strides[8], strides[12]) == (1, 2, 4)
    meter = Meter(CPU, interval_seconds=0.5)
    meter.timeline.stride = 4
    assert meter.sampler._pause() == 2


def test_unknown_columns_are_left_out() -> None:
    timeline = Timeline()
    timeline.add((0.12345, None, None, None, None, 5, 0))
    expected = {"columns": ["seconds", "rss_bytes", "disk_read_bytes"], "rows": [[0.123, 5, 0]]}
    assert timeline.to_json() == expected


def test_marks_are_in_order_and_few() -> None:
    marks = Marks(most_steps=10)
    for step in range(100):
        marks.step(float(step), f"step {step}")
    marks.phase(-1.0, "load")
    marks.phase(100.0, "release")
    told = marks.to_json()
    assert told == sorted(told)
    assert (told[0], told[-1]) == ([-1.0, "load"], [100.0, "release"])
    assert told[-2] == [99.0, "step 99"]
    assert len(told) <= 12


def test_every_stage_says_when_its_steps_ended(tiny: Path, tmp_path: Path) -> None:
    result = lowvram.run("a red circle", str(tiny), tmp_path, steps=3, in_process=True)
    expected = [["text 1", "text 2"], ["step 1", "step 2", "step 3"], ["picture 1"]]
    for stage, steps in zip(result.stages, expected, strict=True):
        assert [name for _, name in stage["marks"]] == ["load", *steps, "compute", "release"]
        seconds = [at for at, _ in stage["marks"]]
        assert seconds == sorted(seconds)
        assert seconds[-1] <= stage["seconds"] + 0.001
        columns, rows = stage["timeline"]["columns"], stage["timeline"]["rows"]
        assert len(rows) >= 4  # one to begin with, and one at each phase's end
        seen = max(row[columns.index("rss_bytes")] for row in rows)
        assert 0 < seen <= stage["peak_rss_bytes"] * 1.02  # the kernel counts in lots of pages
        assert stage["left_tensors"] == []
        assert stage["settings"]["dtype"] == stage["dtype"]
        assert stage["settings"]["model"] == tiny.name
        assert stage["predicted"]["peak_allocated_bytes"] > 0 and stage["budget_bytes"] is None


def test_a_tracker_stands_for_the_device() -> None:
    with Meter(CPU) as meter, LiveBytes("cpu") as tracker:
        meter.tracker = tracker
        kept = torch.empty(1000, dtype=torch.uint8)
        gone = torch.empty(500, dtype=torch.uint8)
        del gone
        meter.sample()
        assert meter.allocated() == 1000
        assert meter.timeline.rows[-1][COLUMNS.index("allocated_bytes")] == 1000
        assert meter.peaks()["peak_allocated_bytes"] == 1500
        assert meter.left_allocated() is None
    del kept


def test_left_tensors_are_named_with_what_holds_them(tiny: Path) -> None:
    kept: list[torch.Tensor] = []
    name, folder = "diffusers.AutoencoderKL", tiny / "vae"

    def keep(vae: Loaded) -> None:
        kept.append(vae.model.decoder.conv_in.weight)

    used = component.use(name, folder, Whole(torch.float32), CPU, Meter(CPU), Room(0), keep)
    [left] = used.left_tensors
    assert (left.owner, left.dtype) == ("decoder.conv_in.weight", "float32")
    assert left.shape == list(kept[0].shape)
    assert left.bytes == kept[0].numel() * 4
    assert left.held_by.startswith("list")


class Holder:
    """Keeps what is given to it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_a_device_is_searched_for_tensors_that_were_not_there() -> None:
    """The device "meta" stands for a GPU: no tensor of another kind lies on it."""
    meta = torch.device("meta")
    old = torch.empty(3, device=meta)
    before = tensors_on(meta)
    holder = Holder(torch.empty(5, 7, device=meta))
    smaller = torch.empty(2, device=meta)
    found = left_tensors(meta, before, {})
    assert [(each.shape, each.bytes) for each in found] == [([5, 7], 140), ([2], 8)]
    assert found[0].owner == "Holder"
    del holder, smaller
    assert left_tensors(meta, before, {}) == []
    assert old.numel() == 3


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="the GPU is in use already")
@pytest.mark.parametrize("name", ["cuda", "xpu"])
def test_looking_creates_no_context(name: str) -> None:
    """Without a GPU torch raises where it would create one."""
    with Meter(torch.device(name)) as meter:
        meter.sample()
    assert not getattr(torch, name).is_initialized()
    assert meter.peaks()["peak_allocated_bytes"] == 0
    assert meter.peaks()["peak_process_bytes"] is None
    assert meter.left_allocated() == 0


@pytest.mark.parametrize("name", ["cuda", "xpu"])
def test_an_allocator_is_asked_once_there_is_a_context(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = getattr(torch, name)
    stats = {
        "allocated_bytes": {"all": {"current": 3, "peak": 5}},
        "reserved_bytes": {"all": {"current": 7, "peak": 9}},
    }
    monkeypatch.setattr(module, "is_initialized", lambda: True)
    monkeypatch.setattr(module, "memory_stats_as_nested_dict", lambda device: stats)
    monkeypatch.setattr(module, "mem_get_info", lambda device: (10, 30))
    monkeypatch.setattr(module, "reset_peak_memory_stats", lambda device: None)
    meter = Meter(torch.device(name))
    meter.sample()
    assert meter.timeline.rows[0][1:3] == (3, 7)
    peaks = meter.peaks()
    assert (peaks["peak_allocated_bytes"], peaks["peak_reserved_bytes"]) == (5, 9)
    if name == "xpu":
        assert peaks["peak_device_bytes"] == 20


def test_metal_keeps_no_peaks_and_the_largest_seen_stand_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = iter((2, 8, 4, 4))
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: next(held))
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 11)
    meter = Meter(torch.device("mps"))
    meter.sample()
    meter.sample()
    peaks = meter.peaks()
    assert (peaks["peak_allocated_bytes"], peaks["peak_process_bytes"]) == (8, 11)
    assert (peaks["peak_reserved_bytes"], peaks["peak_device_bytes"]) == (None, None)
    assert meter.left_allocated() == 2


def test_a_process_has_its_peak_when_its_allocator_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between two looks: strips give their memory back before the next one."""
    reserved = iter((100, 100, 20, 60, 50, 50))  # twice each look: in the second it changes
    process = iter((170, 500, 120))
    meter = Meter(torch.device("cpu"))
    counters = SimpleNamespace(
        allocator=lambda: (0, next(reserved)),
        driver=lambda: (next(process), None),
        peaks=lambda: (0, 400),
    )
    monkeypatch.setattr(meter, "_counters", counters)
    for _ in range(3):
        meter.sample()
    assert meter.peaks()["peak_process_bytes"] == 500
    counters.peaks = lambda: (0, 450)
    assert meter.peaks()["peak_process_bytes"] == 450 + 70
    counters.peaks = lambda: (0, None)
    assert meter.peaks()["peak_process_bytes"] == 500


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_what_a_disk_gives_is_counted(tmp_path: Path) -> None:
    """Of a mapped file too, and nothing of what the page cache holds."""
    path = tmp_path / "weights"
    with open(path, "wb") as file:
        file.write(os.urandom(4 << 20))
        file.flush()
        os.fsync(file.fileno())
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        counters, told = process_counters(), psutil.Process().io_counters().read_bytes
        if counters.disk_read_bytes() is None:
            pytest.skip("this system does not tell")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert len(bytes(mapped)) == 4 << 20
            cold = counters.disk_read_bytes()
            if psutil.Process().io_counters().read_bytes == told:
                pytest.skip("the page cache kept the file")
            assert bytes(mapped)[:1] == file.read(1)
    assert cold is not None and 4 << 20 <= cold < 8 << 20
    again = counters.disk_read_bytes()
    assert again is not None and again - cold < 1 << 20  # code of the program may be read too
