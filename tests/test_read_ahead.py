"""Weights come into the page cache while a stage's libraries are imported."""

import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lowvram
from benchmarks.watched import evict
from lowvram import prepared, read_ahead
from lowvram.memory.process import ProcessCounters, process_counters
from lowvram.progress import Progress
from lowvram.read_ahead import ReadAhead, files_of, reading_ahead
from lowvram.repository import resolve
from lowvram.request.run import resolve_run
from lowvram.request.tasks import to_json

SIZE = 3 << 20  # bytes: three chunks


def tasks_of(model: Path | str, **options: Any) -> dict[str, dict[str, Any]]:
    """A run's tasks by stage, as they are sent to its process."""
    tasks = resolve_run("a cat", resolve(str(model)), Path("x.png"), **options)
    return dict(zip(("encode", "denoise", "decode"), map(to_json, tasks), strict=True))


def test_each_stage_reads_its_own_component(tiny: Path) -> None:
    for stage, role in (("encode", "text_encoder"), ("denoise", "transformer"), ("decode", "vae")):
        found = files_of(stage, tasks_of(tiny)[stage])
        assert found == sorted((tiny / role).glob("*.safetensors")) != []


def test_what_is_prepared_is_read_instead(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    from lowvram.stages.prepare import prepare

    prepare(resolve(str(tiny)), "8bit")
    named = files_of("encode", tasks_of(tiny, encoder_weights="8bit")["encode"])
    assert named == sorted(
        next(each.path for each in prepared.list_prepared() if "8bit" in each.name).glob(
            "*.safetensors"
        )
    )
    assert named[0].parent.name == "text_encoder-8bit"
    other = files_of("encode", tasks_of(tiny)["encode"])
    assert other == sorted((tiny / "text_encoder").glob("*.safetensors"))


def test_given_embeddings_need_no_weights(tiny: Path) -> None:
    assert files_of("encode", tasks_of(tiny)["encode"] | {"embeds": "given.safetensors"}) == []


@pytest.fixture
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two files out of the page cache; whatever the stage, they are what it reads."""
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path in paths:
        path.write_bytes(os.urandom(SIZE))
    evict(tmp_path)
    monkeypatch.setattr(read_ahead, "files_of", lambda stage, task: paths)
    return paths


def read_by(ahead: ReadAhead, before: ProcessCounters) -> int:
    """Bytes that came from the disk until it had read all."""
    ahead._thread.join(30)
    found = before.disk_read_bytes()
    if found is None:
        pytest.skip("this system does not tell what was read")
    return found


def test_files_are_read_once(cold: list[Path]) -> None:
    before = process_counters()
    if not read_by(ReadAhead("encode", {}), before):
        pytest.skip("this file system keeps its pages")
    assert before.disk_read_bytes() == pytest.approx(2 * SIZE, rel=0.1)
    again = process_counters()
    assert read_by(ReadAhead("encode", {}), again) == 0  # they are there


def test_no_more_than_a_share_of_the_memory(
    cold: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "_SHARE", 0)
    before = process_counters()
    assert read_by(ReadAhead("encode", {}), before) == 0


def test_it_ends_when_the_stage_begins_to_load(
    cold: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "files_of", lambda stage, task: itertools.cycle(cold))
    heard: list[Progress] = []
    with reading_ahead("encode", [{}], heard.append) as hear:
        (thread,) = (each for each in threading.enumerate() if each.name == "lowvram-ahead")
        hear(Progress("encode", "loading the text encoder"))
        thread.join(30)
        assert not thread.is_alive()
    assert [each.doing for each in heard] == ["loading the text encoder"]
    with reading_ahead("plan", [{}], heard.append):
        assert not any(each.name == "lowvram-ahead" for each in threading.enumerate())


def test_nothing_that_goes_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(stage: str, task: object) -> list[Path]:
        return [Path("nowhere.safetensors")]

    raised: list[object] = []
    monkeypatch.setattr("threading.excepthook", raised.append)
    monkeypatch.setattr(read_ahead, "files_of", broken)
    ReadAhead("encode", {}).close()
    ReadAhead("encode", {"model": {}}).close()
    assert raised == []


@pytest.mark.parametrize("alone", [True, False], ids=["one stage", "a run"])
def test_stages_are_read_ahead_for(
    alone: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    look: Callable[..., list[Path]] = read_ahead.files_of

    def note(stage: str, task: Any) -> list[Path]:
        asked.append(stage)
        return look(stage, task)

    monkeypatch.setattr(read_ahead, "files_of", note)
    if alone:
        lowvram.encode("a cat", str(tiny), output=tmp_path / "x.embeds.safetensors")
        assert asked == ["encode"]
    else:
        lowvram.run("a cat", str(tiny), tmp_path / "x.png", steps=1)
        assert asked == ["encode", "denoise", "decode"]
