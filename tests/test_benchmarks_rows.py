"""The result file of the GPU benchmark: keys, which of two rows counts, and notes.

Run: scripts/test tests/test_benchmarks_rows.py
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.side_by_side.parts import PARTS
from benchmarks.side_by_side.rows import GIB, Plan, Store, machine_key, merged, readable

ROW = Plan("first", "lowvram", 1024, cache="warm", budget=GIB)
FIGURES = {"ok": True, "error": None, "seconds": 1}
OUT = {"ok": False, "error": "out of memory at encode"}
CANNOT = {"ok": False, "error": "cannot: stopped after 240 s"}


def test_keys_tell_every_planned_row_from_every_other() -> None:
    assert ROW.key == "first/lowvram budget 1 GiB/1024 px/1 picture/20 steps/warm"
    staged = replace(ROW, budget=None, stage_budget=270_000_000, cache="")
    assert staged.key == "first/lowvram stage-budget 0.27 GB/1024 px/1 picture/20 steps"
    plans = [plan for part in PARTS.values() for plan in part(lambda side: side, False)]
    assert len({plan.key for plan in plans}) == len(plans)


@pytest.mark.parametrize("part", PARTS)
def test_a_quick_part_is_a_part_of_the_whole_one(part: str) -> None:
    plan = PARTS[part]
    if part == "many":  # its per-prompt rows are fewer prompts
        return
    assert {p.key for p in plan(int, True)} <= {p.key for p in plan(int, False)}
    assert all(p.part == part for p in plan(int, False))


def test_only_rows_without_times_run_side_by_side() -> None:
    timed = {name: {p.timed for p in part(int, False)} for name, part in PARTS.items()}
    assert {name for name, kinds in timed.items() if kinds == {False}} == {"memory", "predicted"}
    assert all(len(kinds) == 1 for kinds in timed.values())


def test_a_row_measured_anew_replaces_the_old_one_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "new" / "gpu.json"
    store = Store(path, {"card": "A"})
    store.add("a", {"ok": True, "error": None})
    store.add("b", {"ok": False, "error": "out of memory at encode"})
    later = Store(path, {"card": "B"})
    later.add("a", {"ok": True, "error": None, "seconds": 2})
    found = json.loads(path.read_text())
    assert found["rows"]["a"]["seconds"] == 2
    assert found["rows"]["b"]["error"] == "out of memory at encode"
    assert found["machines"][found["rows"]["a"]["machine"]] == {"card": "B"}
    assert found["machines"][found["rows"]["b"]["machine"]] == {"card": "A"}
    assert [each.name for each in path.parent.iterdir()] == ["gpu.json"]


def test_of_two_files_the_later_row_counts() -> None:
    def file(machine: str, measured: str) -> dict[str, Any]:
        rows = {"a": {"machine": machine, "measured": measured}}
        return {"machines": {machine: {}}, "rows": rows}

    old, new = file("x", "2026-01-01 10:00 UTC"), file("y", "2026-01-02 09:00 UTC")
    assert merged(old, new)["rows"]["a"]["machine"] == "y"
    assert merged(new, old)["rows"]["a"]["machine"] == "y"
    assert set(merged(old, new)["machines"]) == {"x", "y"}


def test_a_machine_is_its_facts_in_any_order() -> None:
    assert machine_key({"a": 1, "b": 2}) == machine_key({"b": 2, "a": 1})
    assert machine_key({"a": 1}) != machine_key({"a": 2})


def test_bytes_are_said_in_binary_units() -> None:
    assert [readable(b) for b in (8 * GIB, GIB + GIB // 2, GIB // 4)] == [
        "8 GiB", "1.5 GiB", "256 MiB",
    ]  # fmt: skip


def test_notes_of_a_file_stay_when_rows_are_added(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"notes": ["beside others"], "machines": {}, "rows": {}}))
    Store(path, {"cpu": "x"}).add("a", {"ok": True})
    assert json.loads(path.read_text())["notes"] == ["beside others"]
    assert merged(json.loads(path.read_text()), {"machines": {}, "rows": {}})["notes"]


@pytest.mark.parametrize(
    ("before", "after", "replaced"),
    [
        (FIGURES, OUT, True),
        (FIGURES, CANNOT, False),
        (OUT, CANNOT, False),
        (OUT, FIGURES, True),
        (CANNOT, {**CANNOT, "error": "cannot: another reason"}, True),
    ],
)
def test_only_a_result_replaces_a_result(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], replaced: bool
) -> None:
    store = Store(tmp_path / "gpu.json", {})
    assert store.add("a", before)
    assert store.add("a", after) is replaced
    kept = json.loads(store.path.read_text())["rows"]["a"]
    assert kept["error"] == (after if replaced else before)["error"]
    early, late = (
        {"machines": {}, "rows": {"a": {**row, "measured": f"2026-01-0{day}"}}}
        for day, row in ((1, before), (2, after))
    )
    for both in (merged(early, late), merged(late, early)):
        assert both["rows"]["a"]["error"] == kept["error"]


def dated(day: int, *keys: str, **changes: Any) -> dict[str, Any]:
    rows = {key: {**FIGURES, "measured": f"2026-01-0{day} 10:00 UTC"} for key in keys}
    return {"machines": {}, "rows": rows, **changes}


def test_a_note_goes_when_all_it_is_about_has_results_after_it() -> None:
    note = {"text": "of that day", "about": "first/ours", "written": "2026-01-01 12:00 UTC"}
    old = dated(1, "memory/ours", notes=[note, "random weights"])
    none_yet = merged(old, dated(2, "first/theirs"))
    assert none_yet["notes"] == [note, "random weights"]  # it may say that they are missing
    failed = dated(2, "first/ours 1")
    failed["rows"]["first/ours 1"] |= CANNOT
    assert note in merged(old, failed)["notes"]
    for both in (merged(old, dated(2, "first/ours")), merged(dated(2, "first/ours"), old)):
        assert both["notes"] == ["random weights"]
    some = merged({**old, **dated(1, "first/ours 1")}, dated(2, "first/ours 2"))
    assert note in some["notes"]
    assert "notes" not in merged({**old, "notes": [note]}, dated(2, "first/ours"))


def test_notes_of_both_files_stay() -> None:
    assert merged(dated(1, notes=["a", "b"]), dated(1, notes=["b", "c"]))["notes"] == list("abc")
    assert merged(dated(1, notes=["a"]), dated(1))["notes"] == ["a"]


def test_a_note_goes_as_soon_as_its_row_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    note = {"text": "missing", "about": "first/ours", "written": "2026-01-01 12:00 UTC"}
    path.write_text(json.dumps(dated(1, notes=[note])))
    store = Store(path, {})
    store.add("first/ours/1024 px", CANNOT)
    assert json.loads(path.read_text())["notes"] == [note]
    store.add("first/ours/1024 px", FIGURES)
    assert "notes" not in json.loads(path.read_text())


def test_what_a_part_holds_ours_against_runs_before_it() -> None:
    """The interpreter, which peaks are told above, and a reference of the same precision."""
    for name in ("first", "memory"):
        for quick in (True, False):
            ran = [plan.contender for plan in PARTS[name](int, quick)]
            assert ran.index("reference") < ran.index("lowvram")
    assert PARTS["memory"](int, True)[0].contender == "interpreter"


def test_the_stretch_goal_is_tried_in_whole_runs_and_with_room() -> None:
    held = {plan.stage_budget for plan in PARTS["memory"](int, True) if plan.size == 1024}
    assert {270_000_000, 3 * GIB // 10} <= held
    ways = [plan.contender for plan in PARTS["predicted"](int, True)]
    for budget in ("0.27GB", "0.3GiB"):
        assert f"denoise --weights stream --stage-budget {budget}" in ways


def test_beside_the_context_2048_px_have_what_they_need() -> None:
    context, need = 793_000_000, 600_000_000  # an H100's, and foretold.json's
    (plan,) = (p for p in PARTS["memory"](int, True) if (p.contender, p.size) == ("lowvram", 2048))
    assert plan.budget is not None and need + context < plan.budget < 2 * GIB
