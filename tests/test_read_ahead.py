"""Weights come into the page cache while a stage's libraries are imported."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lowvram
from benchmarks.watched import evict
from lowvram import prepared, read_ahead
from lowvram.progress import Progress, ignore
from lowvram.read_ahead import ReadAhead, files_of
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


def read_ahead_of() -> int:
    """Bytes that came from the disk, once all is read."""
    with ReadAhead("encode", [{}], ignore) as ahead:
        ahead._thread.join(30)
    return ahead.bytes


def test_files_are_read_once(cold: list[Path]) -> None:
    found = read_ahead_of()
    if not found:
        pytest.skip("this system keeps its pages, or does not tell what was read")
    assert found == pytest.approx(2 * SIZE, rel=0.1)
    assert read_ahead_of() == 0  # they are there


def test_no_more_than_a_share_of_the_memory(
    cold: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "_SHARE", 0)
    assert read_ahead_of() == 0


def test_it_ends_when_the_stage_begins_to_load(
    cold: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "files_of", lambda stage, task: itertools.cycle(cold))
    heard: list[Progress] = []
    with ReadAhead("encode", [{}], heard.append) as ahead:
        assert ahead._thread.is_alive()
        ahead.hear(Progress("encode", "loading the text encoder"))
        ahead._thread.join(30)
        assert not ahead._thread.is_alive()
    assert [each.doing for each in heard] == ["loading the text encoder"]
    with ReadAhead("plan", [{}], heard.append) as ahead:
        assert not ahead._thread.is_alive()


def test_nothing_that_goes_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[object] = []
    monkeypatch.setattr("threading.excepthook", raised.append)
    tasks = [{"embeds": "", "model": {}}]
    with ReadAhead("encode", tasks, ignore) as ahead:
        ahead._thread.join(30)
    monkeypatch.setattr(read_ahead, "files_of", lambda stage, task: [Path("nowhere.safetensors")])
    with ReadAhead("encode", tasks, ignore) as ahead:
        ahead._thread.join(30)
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
