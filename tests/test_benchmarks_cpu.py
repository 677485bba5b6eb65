"""The CPU benchmark: a row that cannot be tried again does not pass for one of this run.

Run: scripts/test tests/test_benchmarks_cpu.py
"""

import json
from pathlib import Path

import pytest

from benchmarks import cpu
from benchmarks.cpu_rows import rows_of
from benchmarks.machine import save_rows
from benchmarks.page.cpu import body

ENCODE, DENOISE, DECODE = (
    f"tiny/stage/{name}" for name in ("encode-stream", "denoise-stream", "decode-strips")
)


def test_a_row_that_lacks_what_an_earlier_one_makes_is_marked_as_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = {"part": "tiny", "kind": "stage", "wall_seconds": 1.0, "error": None}
    known = {**about, "ok": False, "error": "stopped after 120 s", "recorded": {}}
    save_rows("cpu", {DENOISE: {**known, "name": "denoise stream"}}, tmp_path)
    failed = {**about, "ok": False, "error": "exit code 1: no", "peaks_seen": None}
    monkeypatch.setattr(cpu, "measure", lambda row, place: {**failed, "name": row.name})
    options = ["--quick", "--folder", str(tmp_path), "--results", str(tmp_path), "--rows"]
    assert cpu.main([*options, "tiny/*"]) == 1
    found = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert found[DENOISE]["error"] == "stopped after 120 s"
    assert "tiny/stage/encode-*" in found[DENOISE]["not_measured_again"]["why"]
    assert DECODE not in found  # nothing was known of it
    assert "not_measured_again" not in found[ENCODE]
    assert "| denoise stream (older: not measured again on 20" in body({"rows": found})
    for file in ("x.embeds.safetensors", "x.latents.safetensors"):
        (tmp_path / "cpu" / "tiny-stages" / file).touch()
    assert cpu.main([*options, DENOISE]) == 0
    again = json.loads((tmp_path / "cpu.json").read_text())["rows"][DENOISE]
    assert (again["error"], "not_measured_again" in again) == ("exit code 1: no", False)
    assert {ENCODE, DENOISE, DECODE} <= set(rows_of("quick"))
