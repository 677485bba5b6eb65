"""benchmarks/README.md: made of the result files, complete, and never out of step."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.distance import distance
from benchmarks.machine import commit_of, save_rows, versions
from benchmarks.page.gpu import entries, step_ratios
from benchmarks.page.page import page, read
from benchmarks.page.sections import SECTIONS
from benchmarks.page.tables import measured_on
from benchmarks.side_by_side.rows import Plan

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COMMAND = [sys.executable, "scripts/benchmarks_page.py", "--check", "--folder"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page and the results, to be changed at will."""
    shutil.copytree(RESULTS, tmp_path / "results")
    shutil.copy(ROOT / "benchmarks" / "README.md", tmp_path)
    return tmp_path


def changed(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a result file in place."""
    path = folder / "results" / f"{name}.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, str(folder)], cwd=ROOT, capture_output=True, text=True)


def test_the_page_is_in_step() -> None:
    done = check(ROOT / "benchmarks")
    assert (done.returncode, done.stdout) == (0, "")


def test_a_stale_page_is_caught(folder: Path) -> None:
    assert check(folder).returncode == 0
    changed(folder, "streaming", lambda it: it["rows"]["read"].update(seconds=1234.0))
    done = check(folder)
    assert done.returncode == 1
    assert "stale" in done.stdout


def test_a_number_comes_from_its_file(folder: Path) -> None:
    before = page(read(folder / "results"))
    changed(folder, "streaming", lambda it: it["rows"]["read"].update(seconds=1234.0))
    after = page(read(folder / "results"))
    assert "1234 s" not in before
    differing = set(after.splitlines()) - set(before.splitlines())
    assert len(differing) == 1
    assert "1234 s" in differing.pop()


@pytest.mark.parametrize("name", [section.name for section in SECTIONS])
def test_a_missing_result_is_said(folder: Path, name: str) -> None:
    results = read(folder / "results")
    results.pop(name, None)
    text = page(results)
    missing = text.partition("## Not measured")[2]
    title = next(section.title for section in SECTIONS if section.name == name)
    assert f"results/{name}.json is missing" in missing
    assert f"## {title}\n" not in text


def test_a_result_that_nothing_shows_is_an_error(folder: Path) -> None:
    (folder / "results" / "forgotten.json").write_text("{}")
    done = check(folder)
    assert done.returncode == 1
    assert "forgotten" in done.stdout


def test_what_was_not_recorded_is_said() -> None:
    results = read(RESULTS)
    results["sizes"] = {n: results["sizes"][n] for n in results["sizes"] if n not in _ABOUT}
    section = page(results).partition("## Sizes that come back as asked")[2].partition("\n## ")[0]
    assert "Machine: not recorded; versions: not recorded; date: not recorded." in section


_ABOUT = ("machine", "versions", "date", "load_average_before")


def gpu(**peaks: int) -> dict[str, Any]:
    """A GPU's results with one run of each contender that is named."""
    rows = {
        f"memory/{name.replace('_', '-')} limit 8 GiB/1024 px/1 picture/2 steps": {
            "ok": True,
            "error": None,
            "machine": "m",
            "measured": "2026-01-02 03:04 UTC",
            "stages": [{"name": "denoise", "seconds": 1.0, "peak_allocated_bytes": peak}],
        }
        for name, peak in peaks.items()
    }
    return {
        "benchmark": "gpu",
        "machines": {"m": {"cpu": "a CPU", "gpu": "a GPU", "gpu_memory_bytes": 8 << 30}},
        "rows": rows,
    }


def goal(results: dict[str, Any], name: str) -> str:
    """The line of a goal."""
    return next(line for line in page(results).splitlines() if line.startswith(f"| {name} |"))


def test_goals_say_by_how_much() -> None:
    """Met, missed, and not measured."""
    name, results = "peak allocated, any stage, 1024 px", read(RESULTS)
    results["gpu"] = gpu(lowvram=400_000_000, published_8bit=8_000_000_000)
    assert "| 8.00 GB | 0.40 GB | met | gpu.json" in goal(results, name)
    results["gpu"] = gpu(lowvram=600_000_000)
    assert "| not measured | 0.60 GB | 0.10 GB (20%) | gpu.json" in goal(results, name)
    del results["gpu"]
    assert "| not measured | not measured | – | – |" in goal(results, name)


def test_stages_that_were_run_alone_stand_in_for_a_run() -> None:
    """The largest of the three, each in the way that holds least; none where one is missing."""
    name, results = "peak allocated, any stage, 1024 px", read(RESULTS)
    results["cuda"] = {}
    peaks = {"encode --weights stream": 300_000_000, "encode --weights 4bit": 1,
             "denoise --weights whole": 900_000_000, "denoise --weights stream": 400_000_000,
             "decode --decode strips": 350_000_000}  # fmt: skip
    rows = {
        f"predicted/{what}/1024 px/1 picture/5 steps": {
            "ok": True,
            "stages": [{"name": what.split()[0], "weights": what.split()[-1],
                        "peak_allocated_bytes": held}],
        }
        for what, held in peaks.items()
    }  # fmt: skip
    results["gpu"] = {"rows": rows}
    stages = "stage by stage, most in denoise --weights stream"
    assert f"| 0.40 GB | met | gpu.json, 1024 px, {stages} |" in goal(results, name)
    rows |= gpu(lowvram=450_000_000)["rows"]  # a run that went well, and held more
    assert f"| 0.40 GB | met | gpu.json, 1024 px, {stages} |" in goal(results, name)
    within = "memory/lowvram stage-budget 0.27 GB/1024 px/1 picture/2 steps"
    for row in gpu(lowvram=260_000_000)["rows"].values():
        rows[within] = row
    ours = "| 0.26 GB | met | gpu.json, 1024 px, lowvram, stage-budget 0.27 GB |"
    assert ours in goal(results, "the same, stretch")
    del rows[within], rows["memory/lowvram limit 8 GiB/1024 px/1 picture/2 steps"]
    del rows["predicted/decode --decode strips/1024 px/1 picture/5 steps"]
    assert "| not measured | not measured |" in goal(results, name)


def test_a_run_that_failed_meets_no_goal() -> None:
    results = read(RESULTS) | {"gpu": gpu(lowvram=1)}
    for row in results["gpu"]["rows"].values():
        row |= {"ok": False, "error": "out of memory at decode", "stages": []}
    text = page(results)
    assert "out of memory at decode" in text
    assert "| not measured | not measured |" in goal(results, "peak allocated, any stage, 1024 px")


def test_what_a_process_takes_that_holds_nothing_is_taken_off() -> None:
    name, results = "host RAM peak above the interpreter", read(RESULTS)
    results["gpu"] = gpu(lowvram=1, published_8bit=1)
    for key, row in results["gpu"]["rows"].items():
        row["stages"][0]["peak_rss_bytes"] = 20e9 if "published" in key else 3.8e9
    assert "| 20.00 GB | 3.80 GB | 1.80 GB (90%) | " in goal(results, name)
    assert "interpreter included" in goal(results, name)
    bare = {"ok": True, "stages": [{"name": "all", "peak_rss_bytes": 2e9}]}
    results["gpu"]["rows"]["memory/interpreter"] = bare
    assert (
        "| 18.00 GB | 1.80 GB | met | gpu.json, 1024 px, lowvram, limit 8 GiB, above 2.00 GB of"
        in goal(results, name)
    )


def test_what_is_foretold_is_of_the_stage_that_needs_most() -> None:
    held = {
        ("encode", 0): 3e8,
        ("denoise", 1024): 4e8,
        ("decode", 1024): 2e8,
        ("decode", 4096): 9e8,
    }
    rows = [
        {"stage": stage, "side": side, "budget_bytes": 1, "way": "a way",
         "predicted": {"peak_allocated_bytes": size, "peak_reserved_bytes": size}}
        for (stage, side), size in held.items()
    ]  # fmt: skip
    results = read(RESULTS) | {"foretold": {"rows": rows, "cards": []}}
    assert goal(results, "peak allocated, any stage, 1024 px").endswith("| 0.40 GB |")
    assert goal(results, "peak allocated, 4096 px").endswith("| 0.90 GB |")
    assert goal(results, "a step, streamed to resident, consumer speed").endswith("| – |")


def test_rows_are_merged_by_key(tmp_path: Path) -> None:
    save_rows("cpu", {"a": {"seconds": 1}, "b": {"seconds": 2}}, tmp_path)
    save_rows("cpu", {"b": {"seconds": 3}, "c": {"seconds": 4}}, tmp_path)
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert {key: row["seconds"] for key, row in rows.items()} == {"a": 1, "b": 3, "c": 4}
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]


def test_distance_counts_levels(tmp_path: Path) -> None:
    """One of four pixels, one of three channels, ten levels."""
    for name, level in (("one", 100), ("other", 110)):
        (tmp_path / name).mkdir()
        picture = Image.new("RGB", (2, 2), (100, 100, 100))
        picture.putpixel((0, 0), (level, 100, 100))
        picture.save(tmp_path / name / "picture-000.png")
    found = distance(tmp_path / "other", tmp_path / "one")
    assert found is not None
    assert (found["largest"], found["mean"]) == (10, pytest.approx(10 / 12))
    assert found["psnr"] == pytest.approx(38.92, abs=0.01)  # 10 log10(255² / (100 / 12))
    same = distance(tmp_path / "one", tmp_path / "one")
    assert same is not None
    assert (same["largest"], same["psnr"]) == (0, None)
    (tmp_path / "one" / "picture-000.png").unlink()
    assert distance(tmp_path / "other", tmp_path / "one") is None  # nothing to compare with


def test_keys_of_a_gpu_say_what_ran() -> None:
    key = "first/lowvram budget 1.5 GiB limit 512 MiB/1024 px/10 pictures/20 steps/cold/prepared"
    (entry,) = entries({"rows": {key: {"ok": True}}})
    assert (entry.part, entry.what, entry.size, entry.pictures) == ("first", "lowvram", 1024, 10)
    assert entry.bounds == {"budget": 3 << 29, "limit": 1 << 29}
    assert (entry.steps, entry.cache, entry.also) == (20, "cold", ("prepared",))
    plan = Plan("memory", "lowvram", 1024, stage_budget=3 * (1 << 30) // 10)
    (entry,) = entries({"rows": {plan.key: {"ok": True}}})
    assert (entry.what, entry.name) == ("lowvram", "lowvram, stage-budget 307.2 MiB")
    assert round(entry.bounds["stage-budget"]) == plan.stage_budget
    key = "memory/model-offload/4096 px/1 picture/decode only"
    (entry,) = entries({"rows": {key: {"ok": True}}})
    assert (entry.steps, entry.cache, entry.also) == (0, "", ())


def test_a_streamed_step_is_held_against_the_resident_one_of_its_kind() -> None:
    seconds = {
        "whole/1024 px/1 picture/5 steps": 0.1,
        "stream/1024 px/1 picture/5 steps/bus 7.9e+09 B per s": 0.4,
        "whole/1024 px/1 picture/5 steps/block 0.031 s": 1.0,
        "stream/1024 px/1 picture/5 steps/bus 7.9e+09 B per s/block 0.031 s": 1.05,
    }
    rows = {
        f"throttled/denoise --weights {key}": {"ok": True, "seconds_per_step": taken}
        for key, taken in seconds.items()
    }
    ratios = step_ratios(entries({"rows": rows}), "throttled")
    assert sorted(ratios.values()) == [pytest.approx(1.05), pytest.approx(4.0)]
    line = goal(
        read(RESULTS) | {"gpu": {"rows": rows}}, "a step, streamed to resident, consumer speed"
    )
    assert "| 1.05 | 0.02 (2%) | gpu.json, throttled |" in line


def test_a_result_says_of_which_lowvram_it_is(tmp_path: Path) -> None:
    """The page shows it where it was recorded; files from before stay as they are."""
    found = versions()
    assert found["lowvram"] == version("lowvram")
    known = {"machine": "a CPU", "versions": {"torch": "2.11", "lowvram": "0.1.0"}}
    assert "versions: torch 2.11, lowvram 0.1.0; " in measured_on(known)
    known["versions"] = {"torch": "2.11", "lowvram": "0.1.0", "lowvram_commit": "abc1234"}
    assert "versions: torch 2.11, lowvram 0.1.0 abc1234; " in measured_on(known)
    assert "versions: torch 2.11; " in measured_on({"versions": {"torch": "2.11"}})
    inner = tmp_path / "inner"
    inner.mkdir()
    assert commit_of(inner) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    commit_of.cache_clear()
    commit = commit_of(tmp_path)
    assert commit and head.startswith(commit)
    assert commit_of(inner) is None  # unpacked within another checkout
