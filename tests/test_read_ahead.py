"""Weights come into the page cache while a stage's libraries are imported."""

import io
import itertools
import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lowvram
from benchmarks.watched import evict
from lowvram import prepared, processes, read_ahead
from lowvram.progress import Progress
from lowvram.read_ahead import ReadAhead, files_of, read_for
from lowvram.repository import resolve
from lowvram.request.run import resolve_run
from lowvram.request.tasks import to_json
from lowvram.stages.dispatch import COMPONENTS

SIZE = 3 << 20  # bytes: three chunks


def tasks_of(model: Path | str, **options: Any) -> dict[str, dict[str, Any]]:
    """A run's tasks by stage, as they are sent to its process."""
    tasks = resolve_run("a cat", resolve(str(model)), Path("x.png"), **options)
    return {stage: to_json(task) for stage, task in tasks.by_stage().items()}


def test_each_stage_reads_its_own_component(tiny: Path) -> None:
    for stage, role in (("encode", "text_encoder"), ("denoise", "transformer"), ("decode", "vae")):
        found = files_of(stage, [tasks_of(tiny)[stage]])
        assert found == sorted((tiny / role).glob("*.safetensors")) != []


def test_what_is_prepared_is_read_instead(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    from lowvram.stages.prepare import prepare

    prepare(resolve(str(tiny)), "8bit")
    named = files_of("encode", [tasks_of(tiny, encoder_weights="8bit")["encode"]])
    assert named == sorted(
        next(each.path for each in prepared.list_prepared() if "8bit" in each.name).glob(
            "*.safetensors"
        )
    )
    assert named[0].parent.name == "text_encoder-8bit"
    other = files_of("encode", [tasks_of(tiny)["encode"]])
    assert other == sorted((tiny / "text_encoder").glob("*.safetensors"))


def test_while_budgets_are_looked_at_the_first_stage_is_read_for(tiny: Path) -> None:
    tasks = tasks_of(tiny)
    assert files_of("plan", [tasks, tasks]) == files_of("encode", [tasks["encode"]]) != []
    from_pictures = {"encode-image": {**tasks["decode"], "dtype": "auto"}, **tasks}
    assert files_of("plan", [from_pictures]) == files_of("decode", [tasks["decode"]]) != []
    assert read_for("plan", [from_pictures]) == "encode-image"
    assert files_of("plan", []) == []


def test_given_embeddings_need_no_weights(tiny: Path) -> None:
    own, given = tasks_of(tiny)["encode"], {"embeds": "given.safetensors"}
    assert files_of("encode", [own | given]) == []
    assert files_of("encode", [own | given, own]) == files_of("encode", [own]) != []


def test_of_a_transformer_what_its_dtype_asks_for(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared in float16 it serves GPUs; a CPU computes in float32, from the model's own files."""
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    from lowvram.stages.prepare import prepare

    prepare(resolve(str(tiny)), "bf16")
    own = sorted((tiny / "transformer").glob("*.safetensors"))
    task = tasks_of(tiny, device="cpu")["denoise"]
    assert files_of("denoise", [task]) == own
    (made,) = files_of("denoise", [task | {"dtype": "fp16"}])
    assert made.parent.name == "transformer-float16"
    monkeypatch.setattr(read_ahead, "_likely_device", lambda: "cuda")
    assert files_of("denoise", [task | {"device": "auto"}]) == [made]


def test_other_files_in_the_folder_are_left_alone(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny, copy)
    (copy / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another")
    (found,) = files_of("decode", [tasks_of(copy)["decode"]])
    assert found.name == "diffusion_pytorch_model.safetensors"


@pytest.fixture
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two files out of the page cache; whatever the stage, they are what it reads."""
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path in paths:
        path.write_bytes(os.urandom(SIZE))
    evict(tmp_path)
    monkeypatch.setattr(read_ahead, "files_of", lambda stage, tasks: paths)
    monkeypatch.setattr(read_ahead, "_BUFFERS", 1)
    return paths


def read_ahead_of() -> int:
    """Bytes that came from the disk, once all is read."""
    with ReadAhead("encode", [{}]) as ahead:
        ahead._thread.join(30)
    return ahead.ended()


def test_files_are_read_once(cold: list[Path]) -> None:
    found = read_ahead_of()
    if not found:
        pytest.skip("this system keeps its pages, or does not tell what was read")
    assert SIZE / 2 < found < 2.2 * SIZE  # not every page has gone when it was asked to
    assert read_ahead_of() == 0  # they are there


def test_no_more_than_is_allowed(cold: list[Path]) -> None:
    ahead, chunk = ReadAhead("encode", [{}]), 1 << 20
    assert ahead._read(cold[0], chunk + 1) == 2 * chunk
    assert ahead._read(cold[0], 10 * SIZE) == SIZE
    ahead._stop.set()
    assert ahead._read(cold[0], SIZE) == 0


def test_it_ends_when_the_stage_begins_to_load(
    cold: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "files_of", lambda stage, tasks: itertools.cycle(cold))
    monkeypatch.setattr(read_ahead, "_SHARE", 1e9)  # it would go on for years
    with ReadAhead("encode", [{}]) as ahead:
        assert ahead._thread.is_alive()
        ahead.stop()
        ahead._thread.join(30)
        assert not ahead._thread.is_alive()
    with ReadAhead("encode", [{}]) as ahead:
        pass
    assert not ahead._thread.is_alive()
    with ReadAhead("check", [{}]) as ahead:
        assert not ahead._thread.is_alive()


def test_nothing_that_goes_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[object] = []
    monkeypatch.setattr("threading.excepthook", raised.append)
    tasks = [{"embeds": "", "model": {}}]
    with ReadAhead("encode", tasks) as ahead:
        ahead._thread.join(30)
    monkeypatch.setattr(read_ahead, "files_of", lambda stage, tasks: [Path("nowhere.safetensors")])
    with ReadAhead("encode", tasks) as ahead:
        ahead._thread.join(30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: 1 / 0)
    with ReadAhead("encode", tasks) as ahead:
        ahead._thread.join(30)

    def full(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    with ReadAhead("encode", tasks):
        pass
    assert raised == []


def test_every_stage_of_a_run_is_read_ahead_for(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[ReadAhead] = []

    class Seen(ReadAhead):
        def __enter__(self) -> "Seen":
            begun.append(self)
            super().__enter__()
            self._bytes = 5
            return self

        def _run(self) -> None:
            self._stop.wait(60)

    def hear(progress: Progress) -> None:
        assert begun[-1]._stop.is_set()  # told before anyone else

    monkeypatch.setattr(processes, "ReadAhead", Seen)
    made = lowvram.run("a cat", str(tiny), tmp_path / "x.png", steps=1, on_progress=hear)
    stages = [each._stage for each in begun]
    assert [name for name in stages if name in COMPONENTS] == ["encode", "denoise", "decode"]
    for report in made.stages:
        if report["disk_read_bytes"] is not None:
            assert report["disk_read_bytes"] >= 5


def test_what_was_read_for_a_stage_is_in_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what was read for it while its budget was looked at, which reports nothing."""
    monkeypatch.setattr(ReadAhead, "__enter__", lambda self: self)
    monkeypatch.setattr(ReadAhead, "ended", lambda self: 5)
    running = processes.StageProcesses()
    seen = []
    for stage, report in (
        ("plan", None),
        ("encode-image", {"disk_read_bytes": 100}),
        ("encode", {"disk_read_bytes": 100}),
        ("denoise", {}),
    ):
        worker = SimpleNamespace(
            stdin=io.StringIO(),
            stdout=[json.dumps({"event": "done", "report": report})],
            poll=lambda: None,
        )
        monkeypatch.setattr(running, "_worker", worker)
        tasks = [{"encode-image": {}, "encode": {}}] if stage == "plan" else []
        told = running.run(stage, tasks, lambda progress: None, lambda index, outcome: None)
        seen.append(told["report"])
    assert seen == [None, {"disk_read_bytes": 110}, {"disk_read_bytes": 105}, {}]
