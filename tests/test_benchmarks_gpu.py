"""What can be wrong of the GPU benchmark without a GPU: rows, keys, files, the table, what counts
as out of memory, the token bucket, and whether two outputs are one.

Run: scripts/test tests/test_benchmarks_gpu.py
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import gpu
from benchmarks.baselines.contenders import CONTENDERS, text_encoder
from benchmarks.baselines.lowvram import arguments, failure
from benchmarks.baselines.measure import Stages, together
from benchmarks.baselines.outcome import Failed, Outcome, error_of
from benchmarks.baselines.request import PROMPTS, Request, first_prompts
from benchmarks.distance import latents_distance
from benchmarks.side_by_side import throttle
from benchmarks.side_by_side.agreement import SAME, Agreement, Kind, within
from benchmarks.side_by_side.checkpoint import write_tiled
from benchmarks.side_by_side.parts import PARTS
from benchmarks.side_by_side.processes import Ended, json_of, lines_of
from benchmarks.side_by_side.rows import GIB, Plan
from benchmarks.side_by_side.running import Runner, believed
from benchmarks.side_by_side.table import brief, peak, table
from benchmarks.side_by_side.throttle import TokenBucket, disk
from benchmarks.watched import evict, how_it_ended, run_once
from lowvram.memory.budget import parse_bytes
from lowvram.weights import shards
from scripts.make_checkpoint import Draw

ROW = Plan("first", "lowvram", 1024, cache="warm", budget=GIB)


def request(**changes: Any) -> Request:
    given: dict[str, Any] = {"contender": "lowvram", "model": Path("m"), "prompts": ("a", "b")}
    given |= {"size": 512, "steps": 2, "device": "cuda", "limit": None, "dtype": "fp16"}
    given |= {"output": Path("out"), "seed": 3, "latents": None, "budget": None}
    given |= {"stage_budget": None}
    return Request(**{**given, **changes})


# What a failure is


class OutOfMemoryError(RuntimeError):
    """torch's, by name."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried …"), "out of memory at denoise"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory at denoise"),
        (MemoryError(), "out of memory at denoise"),
        (NotImplementedError("no\nsecond line"), "cannot: NotImplementedError: no"),
        (Failed("cannot: it said so"), "cannot: it said so"),
    ],
)
def test_a_failure_is_one_line(error: Exception, said: str) -> None:
    assert error_of(error, "denoise") == said


def test_what_lowvram_printed_becomes_the_outcome() -> None:
    out = "exit code 6: lowvram: decode ran out of memory (CUDA): use --decode strips"
    assert failure(out) == "out of memory at decode"
    assert (
        failure("exit code 2: lowvram: --vram 1 is too little") == "cannot: --vram 1 is too little"
    )


def test_how_a_process_ended() -> None:
    assert how_it_ended(0, False, 9, ["a warning"]) is None
    assert how_it_ended(1, False, 9, ["first", "last"]) == "exit code 1: last"
    assert "out of memory?" in str(how_it_ended(-9, False, 9, []))
    assert how_it_ended(-9, True, 9, []) == "stopped after 9 s"


def test_lines_come_from_a_process_that_is_stopped_in_time() -> None:
    program = "import time; print(input(), flush=True); time.sleep(60)"
    found = list(lines_of([sys.executable, "-c", program], 2.0, {}, "given\n"))
    assert found == ["given\n", Ended("stopped after 2 s")]
    failing = [sys.executable, "-c", "print('{}'); raise SystemExit('no')"]
    assert json_of(failing, 20, {}) == (None, "exit code 1: no")


# Measuring


def test_stages_add_seconds_and_keep_the_larger_peak() -> None:
    rows = [
        {"seconds": 1.0, "peak_allocated_bytes": 5, "read_bytes": None},
        {"seconds": 2.0, "peak_allocated_bytes": 3, "read_bytes": 7},
    ]
    both = together(rows)
    assert (both["seconds"], both["peak_allocated_bytes"], both["read_bytes"]) == (3.0, 5, 7)
    assert both["peak_process_bytes"] is None


def test_a_stage_entered_again_goes_on() -> None:
    stages = Stages(torch.device("cpu"))
    for name in ("encode", "denoise", "encode"):
        stages.enter(name)
    rows = stages.close()
    assert [row["name"] for row in rows] == ["encode", "denoise"]
    assert all(row["seconds"] >= 0 and row["peak_rss_bytes"] > 0 for row in rows)


def test_seconds_to_the_first_picture_and_to_a_further_one(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for index, path in enumerate(paths):
        path.touch()
        os.utime(path, (110 + 4 * index, 110 + 4 * index))
    made = Outcome([], 100.0, paths, None)
    assert (made.seconds_to_first(), made.seconds_per_further()) == (10.0, 4.0)
    assert Outcome([], 100.0, paths[:1], None).seconds_per_further() is None


# Fairness


def test_noise_is_that_of_lowvram() -> None:
    """Drawn in float32 on the CPU, then rounded: a draw in half precision is another."""
    drawn = torch.randn((1, 4, 64, 64), generator=torch.Generator("cpu").manual_seed(3))
    assert torch.equal(request().noise(), drawn.half())
    assert torch.equal(request(dtype="fp32").noise(), drawn)


def test_lowvram_is_run_as_a_user_would(tmp_path: Path) -> None:
    words = arguments(request(output=tmp_path, budget=GIB))
    assert words[:2] == ["run", "--prompts"]
    assert Path(words[2]).read_text() == "a\nb\n"
    assert words[words.index("--vram") + 1] == "1048576.000KiB"
    assert {"--no-binning", "--no-clean", "--no-cache"} <= set(words)
    assert "--dtype" not in words
    capped = arguments(request(output=tmp_path, prompts=("a",), limit=2 * GIB, dtype="fp32"))
    assert capped[:2] == ["run", "a"]
    assert capped[capped.index("--vram") + 1] == "2097152.000KiB"
    assert capped[capped.index("--dtype") + 1] == "fp32"
    staged = arguments(request(output=tmp_path, stage_budget=270_000_000))
    assert parse_bytes("", staged[staged.index("--stage-budget") + 1]) == 270_000_000
    assert "--vram" not in staged


def test_the_prompts_are_a_hundred_different_ones() -> None:
    assert len(set(first_prompts(100))) == 100 == len(PROMPTS.read_text().splitlines())
    with pytest.raises(ValueError, match="1 to 100"):
        first_prompts(101)


def test_every_contender_has_a_file() -> None:
    folder = PROMPTS.parent
    assert all((folder / f"{name}.py").is_file() for name in CONTENDERS.values())


def test_only_text_encoders_of_one_precision_are_held_against_each_other() -> None:
    assert text_encoder("published-8bit") == text_encoder("published-8bit", "fp32") == "8 bits"
    assert text_encoder("lowvram") == text_encoder("reference") == "bf16"
    assert text_encoder("lowvram", "fp32") == text_encoder("resident", "fp32") == "fp32"
    assert text_encoder("resident") == "fp16"


# Agreement


def saved(folder: Path, name: str, latents: "np.ndarray[Any, Any]", level: int) -> dict[str, Any]:
    from PIL import Image
    from safetensors.numpy import save_file

    save_file({"latents": latents.astype(np.float32)}, folder / f"{name}.safetensors")
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(folder / f"{name}.png")
    return {"latents": str(folder / f"{name}.safetensors"), "pixels": str(folder / f"{name}.png")}


def judged(agreement: Agreement, of: str, outputs: dict[str, Any], blended: bool = False) -> Any:
    """Of "contender" or "contender precision": whether it agrees."""
    contender, _, precision = of.partition(" ")
    return agreement.judge(outputs, Kind(64, 2, precision or "fp16", contender), blended)["agrees"]


def test_outputs_agree_within_rounding_and_not_beyond(tmp_path: Path) -> None:
    base = np.random.default_rng(0).standard_normal((1, 4, 8, 8))
    agreement = Agreement(tmp_path / "outputs", "cuda")
    near, far = base * (1 + SAME / 2), base * (1 + 2 * SAME)
    assert judged(agreement, "a", saved(tmp_path, "a", base, 100)) is None
    assert judged(agreement, "b", saved(tmp_path, "b", near, 101)) is True
    assert judged(agreement, "c", saved(tmp_path, "c", far, 100)) is False
    assert judged(agreement, "d", saved(tmp_path, "d", base, 110)) is False
    assert judged(agreement, "e", saved(tmp_path, "e", base, 110), blended=True) is True
    other = agreement.judge(saved(tmp_path, "f", base * 1.1, 100), Kind(64, 2, "8", "f"), False)
    assert other["agrees"] is None
    assert other["other_distances"]["fp16"] == pytest.approx(0.1)
    assert judged(agreement, "g 4", saved(tmp_path, "g", -base, 100)) is False


def test_no_contender_vouches_for_itself(tmp_path: Path) -> None:
    base = np.random.default_rng(0).standard_normal((1, 4, 8, 8))
    agreement = Agreement(tmp_path / "outputs", "cuda")
    assert judged(agreement, "ours", saved(tmp_path, "small", base, 100)) is None
    assert judged(agreement, "ours", saved(tmp_path, "large", base, 100)) is None
    assert judged(agreement, "reference", saved(tmp_path, "theirs", base, 100)) is True
    again = agreement.judge(saved(tmp_path, "large", base, 100), Kind(64, 2, "fp16", "ours"), False)
    assert (again["agrees"], again["compared_with"]) == (True, "reference")


def test_first_outputs_are_remembered_until_they_are_gone_or_wrong(tmp_path: Path) -> None:
    base = np.random.default_rng(0).standard_normal((1, 4, 8, 8))
    first = Agreement(tmp_path / "outputs", "cuda")
    judged(first, "a", saved(tmp_path, "a", base, 100))
    judged(first, "b 8", saved(tmp_path, "b", base, 100))
    again = Agreement(tmp_path / "outputs", "cuda")  # another run of the benchmark
    assert judged(again, "c", saved(tmp_path, "c", base, 100)) is True
    assert judged(again, "a", saved(tmp_path, "a", -base, 100)) is False  # made again, and wrong
    (tmp_path / "c.png").unlink()
    fresh = Agreement(tmp_path / "outputs", "cuda")
    assert judged(fresh, "d", saved(tmp_path, "d", 1.3 * base, 100)) is None


@pytest.mark.parametrize(
    ("ways", "agrees"),
    [
        (["whole a", "stream a"], [None, True]),
        (["whole a", "stream b", "whole b"], [None, False, None]),
        (["stream a", "stream a"], [None, None]),
    ],
)
def test_a_step_is_held_against_one_of_another_way(
    tmp_path: Path, ways: list[str], agrees: list[bool | None]
) -> None:
    runner = Runner(tmp_path, "cpu", (), 64, 60)
    found = []
    for way, outcome in (words.split() for words in ways):
        plan = Plan("streaming", f"denoise --weights {way}", 64)
        found.append(runner._judged_equal(plan, {"ok": True, "outcome": outcome})["agrees"])
    assert found == agrees


def test_latents_of_another_shape_are_not_compared() -> None:
    one, other = np.zeros((1, 4, 8, 8)), np.zeros((1, 4, 16, 8))
    assert latents_distance(one, other) is None
    assert within(None, 1.0)
    assert not within(float("nan"), None)


def test_a_row_that_disagrees_has_no_time() -> None:
    row = {"ok": True, "agrees": False, "seconds_to_first_picture": 3.0, "stages": [{"seconds": 1}]}
    kept = believed(ROW, json.loads(json.dumps(row)))
    assert kept["seconds_to_first_picture"] is None is kept["stages"][0]["seconds"]
    assert believed(ROW, {**row, "agrees": True, "stages": []})["seconds_to_first_picture"] == 3.0
    beside = believed(replace(ROW, timed=False), {**row, "agrees": True, "stages": []})
    assert beside["seconds_to_first_picture"] is None


# Table


def rows() -> dict[str, dict[str, Any]]:
    stages = [
        {"name": "encode", "peak_allocated_bytes": 2_000_000_000},
        {"name": "decode", "peak_allocated_bytes": 3_000_000_000},
    ]
    ours = {"ok": True, "error": None, "stages": stages, "seconds_to_first_picture": 30.0}
    theirs = {**ours, "seconds_to_first_picture": 60.0}
    out = {"ok": False, "error": "out of memory at encode", "stages": []}
    return {
        replace(ROW, cache="cold").key: ours,
        Plan("first", "published-8bit", 1024, cache="cold").key: theirs,
        Plan("memory", "resident", 2048, limit=8 * GIB).key: out,
    }


def test_the_table_shows_peaks_by_stage_and_what_failed() -> None:
    text = table(rows(), ["first", "memory"]).splitlines()
    assert "2.00 GB" in text[1] and "3.00 GB" in text[1] and "30.0 s" in text[1]
    assert "out of memory at encode" in text[3]
    assert len(table(rows(), ["memory"]).splitlines()) == 2
    assert peak(rows()[replace(ROW, cache="cold").key], "peak_allocated_bytes", "denoise") is None


def test_the_last_line_says_what_failed() -> None:
    found = brief(rows())
    row = Plan("memory", "resident", 2048, limit=8 * GIB).key
    assert found[row][0] == "out of memory at encode"


@pytest.mark.parametrize("start", ["run_once", "json_of"])
def test_packages_that_are_only_on_the_path_are_found(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_there.py").write_text("value = 7")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = (
        "import only_there, benchmarks.watched, json; print(json.dumps({'it': only_there.value}))"
    )
    command = [sys.executable, "-P", "-c", code]
    if start == "run_once":
        ended = run_once(command, 60)
        assert ended["error"] is None
        assert json.loads(ended["output"]) == {"it": 7}
    else:
        assert json_of(command, 60, {}) == ({"it": 7}, None)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_a_grandchild_has_read_counts_once(tmp_path: Path) -> None:
    """Linux adds what a process has read to its parent's account when that has waited for it."""
    size = 20_000_000
    (tmp_path / "x.safetensors").write_bytes(os.urandom(size))
    assert evict(tmp_path) == size
    reads = f"open({str(tmp_path / 'x.safetensors')!r}, 'rb').read(); import time; time.sleep(1)"
    waits = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {reads!r}]); "
    ended = run_once([sys.executable, "-c", waits + "time.sleep(1)"], 60)
    if not ended["read_bytes"]:
        pytest.skip("this system does not tell what was read")
    assert size <= ended["read_bytes"] < 1.6 * size


# Slower on purpose


class Clock:
    """A clock that only sleeping and working move; sleeps overshoot by `overshoot` seconds."""

    def __init__(self, overshoot: float = 0.0) -> None:
        self.seconds, self.slept, self.overshoot = 0.0, 0, overshoot

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.slept += 1
        self.seconds += seconds + self.overshoot


@pytest.mark.parametrize("overshoot", [0.0, 0.0003, 0.01])
def test_the_bucket_lets_its_rate_pass_whatever_sleeps_overshoot(overshoot: float) -> None:
    clock, rate, piece = Clock(overshoot), 3.5e9, 1 << 20
    bucket = TokenBucket(rate, clock.now, clock.sleep)
    for _ in range(5000):
        with bucket.passing(piece):
            clock.seconds += piece / 10e9  # as fast as the page cache gives it
        clock.seconds += piece / 30e9  # converted
    assert 5000 * piece / clock.seconds == pytest.approx(rate, rel=0.02)
    assert clock.slept < 500  # not for each piece


def test_the_bucket_saves_up_no_more_than_a_moment() -> None:
    clock = Clock()
    bucket = TokenBucket(100.0, clock.now, clock.sleep)

    def transfer(seconds: float) -> float:
        """How long 100 bytes take that would take so long by themselves."""
        started = clock.seconds
        with bucket.passing(100):
            clock.seconds += seconds
        return clock.seconds - started

    assert transfer(0.25) == pytest.approx(1.0)
    clock.seconds += 5.0  # idle
    assert transfer(0.25) == pytest.approx(1.0 - 0.02)
    assert transfer(3.0) == 3.0  # slower than the rate by itself
    assert transfer(0.25) == pytest.approx(1.0 - 0.02)
    with pytest.raises(ValueError, match="nothing pass"):
        TokenBucket(0)


def test_reads_are_slowed_from_outside_and_only_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, clock = shards._fill, Clock()
    path = tmp_path / "numbers"
    path.write_bytes(bytes(range(200)))
    out = torch.empty(200, dtype=torch.uint8)
    bucket = partial(TokenBucket, now=clock.now, sleep=clock.sleep)
    monkeypatch.setattr(throttle, "TokenBucket", bucket)
    with disk(1000.0), open(path, "rb", buffering=0) as file:
        shards._fill(file, out, path)
    assert out.tolist() == list(range(200))
    assert clock.seconds == pytest.approx(0.2, abs=0.021)
    assert shards._fill is before


# The checkpoint, and without a GPU


def test_a_tiled_file_holds_the_shapes_scaled_and_the_same_each_time(tmp_path: Path) -> None:
    draws = {
        "a.weight": Draw(torch.empty(300, 400, device="meta"), 0.0, 0.5),
        "b.weight": Draw(torch.empty(300, 400, device="meta"), 0.0, 0.5),
        "norm.weight": Draw(torch.empty(5000, device="meta"), 1.0, 0.02),
    }
    size = write_tiled(tmp_path / "x.safetensors", draws, "float32", "0")
    write_tiled(tmp_path / "y.safetensors", draws, "float32", "0")
    found = load_file(tmp_path / "x.safetensors")
    assert size == (tmp_path / "x.safetensors").stat().st_size
    assert {name: tuple(each.shape) for name, each in found.items()} == {
        "a.weight": (300, 400), "b.weight": (300, 400), "norm.weight": (5000,),
    }  # fmt: skip
    assert float(found["a.weight"].std()) == pytest.approx(0.5, rel=0.02)
    assert float(found["norm.weight"].mean()) == pytest.approx(1.0, rel=0.02)
    assert not torch.equal(found["a.weight"], found["b.weight"])
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_without_a_gpu_it_says_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "machine", lambda: {"gpu": None})
    assert gpu.main(["first", "--folder", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1
    assert "no CUDA GPU" in printed.out
    assert list(tmp_path.iterdir()) == []


def test_figures_of_a_cpu_are_kept_from_those_of_a_gpu() -> None:
    with pytest.raises(SystemExit):
        gpu.main(["first", "--device", "cpu"])


def test_the_script_starts_what_it_names() -> None:
    script = Path(gpu.__file__).with_suffix(".sh")
    helped = subprocess.run(
        ["sh", str(script), "--help"],
        capture_output=True,
        text=True,
        env={"PYTHON": sys.executable},
    )
    assert helped.returncode == 0, helped.stderr
    assert all(part in helped.stdout for part in PARTS)
