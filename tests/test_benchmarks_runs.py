"""How rows of the GPU benchmark are run: order, time, caches, and what happens when one fails.

Run: scripts/test tests/test_benchmarks_runs.py
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.side_by_side import caches, running
from benchmarks.side_by_side.caches import measure_rates, not_prepared, weights_read
from benchmarks.side_by_side.parts import PARTS
from benchmarks.side_by_side.rows import Plan, Store
from benchmarks.side_by_side.running import Runner
from lowvram import prepared
from lowvram.memory import rates

FIGURES = {"ok": True, "error": None}
OURS = Plan("memory", "lowvram", 1024, timed=False)
PREPARED = Plan("prepared", "lowvram", 1024, cache="cold", also=("prepared",))
CARD = (f"torch {version('torch')}",)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path, "cpu", (1024,), 1024, 240.0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results" / "gpu.json", {})


Measure = Callable[[Runner, Plan], dict[str, Any]]


def measured_by(monkeypatch: pytest.MonkeyPatch, measure: Measure) -> None:
    monkeypatch.setattr(Runner, "_measure", measure)


# Which, in which order, how many at once


def test_rows_run_in_the_order_in_which_they_are_named() -> None:
    plans = PARTS["memory"](int, True)
    ran = gpu.chosen(plans, ["published-4bit", "interpreter", "lowvram"])
    names = list(dict.fromkeys(plan.contender for plan in ran))
    assert names == ["published-4bit", "interpreter", "lowvram"]
    assert gpu.chosen(plans, None) == list(plans)


@pytest.mark.parametrize(
    ("card", "ram", "jobs"), [(85e9, 135e9, 4), (85e9, 70e9, 2), (24e9, 135e9, 1), (8e9, 16e9, 1)]
)
def test_rows_run_side_by_side_where_card_and_ram_have_room(
    card: float, ram: float, jobs: int
) -> None:
    assert gpu.jobs_for({"gpu_memory_bytes": card, "memory_bytes": ram}) == jobs


def test_timed_rows_never_run_beside_another(
    runner: Runner, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    running_now, most = [0], [0]

    def measure(runner: Runner, plan: Plan) -> dict[str, Any]:
        running_now[0] += 1
        most[0] = max(most[0], running_now[0])
        time.sleep(0.02)
        running_now[0] -= 1
        return FIGURES

    measured_by(monkeypatch, measure)
    plans = [replace(OURS, steps=steps, timed=True) for steps in range(1, 5)]
    gpu.run_part("first", plans, runner, store, jobs=4)
    assert (len(store.rows), most[0]) == (4, 1)


# What goes wrong


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_fault_of_the_benchmark_is_a_row_and_the_next_one_runs(
    runner: Runner, store: Store, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    def measure(runner: Runner, plan: Plan) -> dict[str, Any]:
        if plan.contender == "lowvram":
            raise OSError("no space left\non the disk")
        return FIGURES

    measured_by(monkeypatch, measure)
    plans = [OURS, replace(OURS, contender="resident")]
    gpu.run_part("memory", plans, runner, store, jobs)
    assert store.rows[plans[0].key]["error"] == "cannot: OSError: no space left"
    assert store.rows[plans[1].key]["ok"]


def test_of_rows_of_one_process_those_that_are_left_say_what_went_wrong(
    runner: Runner, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = PARTS["streaming"](int, True)

    def lines(*_: Any) -> Iterator[str]:
        yield f'{{"key": "{plans[0].key}", "ok": true, "error": null}}'
        yield "no JSON"

    monkeypatch.setattr(running, "lines_of", lines)
    gpu.run_part("streaming", plans, runner, store, 1)
    found = [store.rows[plan.key]["error"] for plan in plans]
    assert found[0] is None
    assert all(str(error).startswith("cannot: JSONDecodeError") for error in found[1:])
    gpu.run_part("streaming", [], runner, store, 1)  # --rows has chosen none of it


# Time


def test_all_of_it_ends_in_time(
    runner: Runner, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu._parse(["first"]).seconds <= 540
    assert runner._left() == 240
    runner.ends = time.monotonic() + 100
    assert runner._left() <= 100
    assert runner._left(rows=5) <= 100
    seen = []

    def measure(runner: Runner, plan: Plan) -> dict[str, Any]:
        seen.append(plan)
        runner.ends = -math.inf  # the time is over meanwhile
        error = "out of memory at encode" if plan is OURS else "cannot: stopped after 3 s"
        return {"ok": False, "error": error}

    measured_by(monkeypatch, measure)
    other = replace(OURS, contender="resident")
    gpu.run_part("memory", [other, OURS], runner, store, 1)
    assert seen == [other]
    assert not store.rows  # being stopped then says nothing of it
    runner.ends = math.inf
    gpu.run_part("memory", [OURS, other], runner, store, 1)
    assert list(store.rows) == [OURS.key]
    gpu.run_part("streaming", PARTS["streaming"](int, True), runner, store, 1)
    assert list(store.rows) == [OURS.key]


# Rates


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for `lowvram doctor`: remembers rates as it does. The caches it was asked for."""
    asked: list[str] = []

    def remember(
        command: Sequence[str], seconds: float, variables: Mapping[str, str]
    ) -> tuple[None, str]:
        assert list(command[2:]) == ["lowvram", "doctor", "--json"] and seconds > 0
        asked.append(variables["LOWVRAM_CACHE"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOWVRAM_CACHE", asked[-1])
            rates.remember("cpu", rates.assumed("cpu"))
        return None, "exit code 5: needed here and not working: int8"

    monkeypatch.setattr(caches, "json_of", remember)
    return asked


def test_the_card_is_measured_once_before_rows_of_ours(
    runner: Runner, store: Store, monkeypatch: pytest.MonkeyPatch, doctor: list[str]
) -> None:
    def measure(runner: Runner, plan: Plan) -> dict[str, Any]:
        assert plan.contender != "lowvram" or doctor
        return FIGURES

    measured_by(monkeypatch, measure)
    runner.card = CARD
    gpu.run_part("memory", [replace(OURS, contender="resident")], runner, store, 4)
    assert doctor == []
    gpu.run_part("memory", [replace(OURS, steps=steps) for steps in (1, 2, 3)], runner, store, 4)
    gpu.run_part("memory", [OURS], runner, store, 4)
    gpu.run_part("predicted", PARTS["predicted"](int, True), runner, store, 1)
    gpu.run_part("prepared", [PREPARED], runner, store, 1)  # the same card: its rates are copied
    assert doctor == [str(runner.folder / "cache-plain")]
    assert (runner.folder / "cache-prepared" / "rates.json").is_file()
    assert all(row["ok"] for row in store.rows.values())


def test_rates_are_of_one_card_and_of_no_cpu(
    runner: Runner, tmp_path: Path, doctor: list[str]
) -> None:
    assert runner.get_ready([OURS])
    assert doctor == []  # no card to measure
    assert measure_rates(tmp_path / "a", (), CARD, 60)
    assert measure_rates(tmp_path / "b", (tmp_path / "a",), CARD, 60)
    assert not measure_rates(tmp_path / "a", (tmp_path / "b",), ("another card", *CARD), 60)
    assert doctor == [str(tmp_path / "a")] * 2
    facts = {"gpu": "NVIDIA H100", "driver": "580.1"}
    assert gpu.card_of(facts, {"torch": "2.11+cu130"}) == (
        "NVIDIA H100",
        "torch 2.11",
        "driver 580.1",
    )


# Prepared weights


def test_a_cold_row_reads_what_was_put_out_of_the_page_cache(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold: list[Path] = []
    monkeypatch.setattr(running, "make_cold", lambda folders: cold.extend(folders))
    monkeypatch.setattr(Runner, "_contender", lambda *_: FIGURES)
    model, cache = runner.folder / "sigma-1024", runner.folder / "cache-prepared"
    assert "comes first" in runner.measure(PREPARED)["error"]  # nothing is prepared yet
    (cache / "prepared" / "sigma" / "transformer-float16").mkdir(parents=True)
    (cache / "prepared" / "sigma" / "transformer-float16" / "x.safetensors").touch()
    assert runner.measure(PREPARED)["ok"]
    assert cold == [cache / "prepared", model / "vae"]
    cold.clear()
    assert runner.measure(replace(OURS, cache="cold"))["ok"]
    assert cold == [model / "text_encoder", model / "transformer", model / "vae"]
    assert cold == weights_read(OURS, model, cache)


def test_a_prepared_row_whose_stages_read_something_else_is_none(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "find", lambda *_: Path("text_encoder-bfloat16"))
    model: Any = None
    _, note = prepared.fetch(model, "text_encoder", "whole", "bfloat16")
    stages = [
        {"name": "encode", "reasons": ["weights stream: block by block", note]},
        {"name": "denoise", "reasons": ["weights whole: 1.7 GB"]},
        {"name": "decode", "reasons": ["decode whole: 4.6 GB"]},
        {"name": "all"},
    ]
    assert not_prepared({"stages": stages}) == "denoise"
    row = {"ok": True, "error": None, "stages": stages, "outputs": {}, "dtype": "fp16"}
    monkeypatch.setattr(running, "json_of", lambda *_: (row, None))
    found = runner._contender(PREPARED, runner.folder)
    assert (found["ok"], found["error"]) == (False, "cannot: was not prepared: denoise")
    stages[1]["reasons"] = [note]
    assert not_prepared({"stages": stages}) == ""
