"""Stages in processes of their own: what they say, and what is said when they die."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from interrupting import interrupt_denoise

import lowvram
from lowvram import errors
from lowvram.processes import StageProcesses
from lowvram.progress import Progress
from lowvram.repository import resolve
from lowvram.request.encode import resolve_encode
from lowvram.request.tasks import to_json


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_one_worker_serves_all_stages_and_dies_when_told(tiny: Path, tmp_path: Path) -> None:
    """Progress, errors and a killed stage, with one worker to save its imports."""
    model = resolve(str(tiny))
    seen: list[Progress] = []
    task = to_json(resolve_encode("a cat", model, tmp_path / "x.embeds.safetensors"))
    told: list[dict[str, Any]] = []

    def hear(index: int, outcome: dict[str, Any]) -> None:
        told.append({"index": index, **outcome})

    with StageProcesses() as processes:
        done = processes.run("encode", [task], seen.append, hear)
        assert told[0]["index"] == 0
        assert told[0]["paths"] == [str(tmp_path / "x.embeds.safetensors")]
        assert done["report"]["stage"] == "encode"
        assert [(p.doing, p.done, p.total) for p in seen][-1] == ("encoding", 2, 2)
        worker = children()[0]

        with pytest.raises(errors.ModelError, match="does not exist"):
            broken = {**task["model"], "sources": {**task["model"]["sources"]}}
            broken["sources"]["tokenizer"] = {"place": "none", "revision": "", "kind": "folder"}
            processes.run("encode", [{**task, "model": broken}], seen.append, hear)
        with pytest.raises(errors.StageDiedError, match="encode met a bug"):
            processes.run("encode", [{**task, "bogus": 1}], seen.append, hear)

        def kill(progress: Progress) -> None:
            for child in worker.children() if worker.children() else [worker]:
                child.send_signal(signal.SIGKILL)

        with pytest.raises(errors.MemoryExhaustedError, match="was killed by the system"):
            processes.run("encode", [task], kill, hear)
        assert len(told) == 1
        processes.run("encode", [task], seen.append, hear)
        assert told[1] == told[0]
    assert children() == []


AHEAD = """
import json, sys
from lowvram import worker

def serve(request, events, last):
    known = any(name.endswith("pixart_transformer_2d") for name in sys.modules)
    events.write(json.dumps([request["stage"], known]) + chr(10))
    events.flush()

worker._serve = serve
worker.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.skipif(torch.version.cuda is not None, reason="importing networks starts the driver")
@pytest.mark.parametrize("first", ["encode", "plan"])
def test_the_worker_imports_ahead_while_a_stage_works(first: str) -> None:
    task = {"model": resolve("demo").record()}
    broken = {"model": {"family": "none"}}  # the stage says it, not the worker
    then = {"encode": "denoise", "plan": "encode"}[first]
    asked = [
        ("encode", broken),
        (first, {"encode": task} if first == "plan" else task),
        (then, task),
    ]
    lines = "".join(json.dumps({"stage": s, "tasks": [each]}) + "\n" for s, each in asked)
    done = subprocess.run(
        [sys.executable, "-c", AHEAD], input=lines, capture_output=True, text=True, timeout=120
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert told == [["encode", False], [first, False], [then, True]], done.stderr


def test_where_processes_cannot_fork(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker a stage, as on Windows and macOS; and no file of the current folder is run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torch.py").write_text("raise SystemExit('a stranger')")
    model = resolve(str(tiny))
    with StageProcesses(fork=False) as processes:
        for name in ("one", "two"):
            output = tmp_path / f"{name}.embeds.safetensors"
            task = to_json(resolve_encode("a cat", model, output))
            told: list[dict[str, Any]] = []
            processes.run(
                "encode", [task], lambda _: None, lambda _, each, to=told: to.append(each)
            )
            assert told[0]["paths"] == [str(output)]
    assert children() == []


def test_a_failed_decode_costs_nothing_before_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowvram.pixels.whole import WholeDecode

    def full(*args: object) -> None:
        raise torch_out_of_memory()

    def torch_out_of_memory() -> Exception:
        import torch

        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(WholeDecode, "decode", full)
    with pytest.raises(errors.MemoryExhaustedError) as caught:
        lowvram.run(
            "a cat", str(tiny), tmp_path / "x.png", steps=1, decode="whole", in_process=True
        )
    kept = tmp_path / "x.latents.safetensors"
    assert kept.exists()
    assert f"go on from it with lowvram decode {kept} and" in str(caught.value)
    monkeypatch.undo()
    assert lowvram.decode(kept, output=tmp_path / "x.png").paths == [tmp_path / "x.png"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupt_ends_everything(tiny: Path, tmp_path: Path) -> None:
    started, said = interrupt_denoise(tiny, tmp_path / "x.png")
    assert started >= 2  # the worker, and the stage
    assert said == "lowvram: interrupted"
    assert (tmp_path / "x.embeds.safetensors").exists()
    assert not (tmp_path / "x.latents.safetensors").exists()


def test_a_worker_finds_packages_that_are_only_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python imports `sitecustomize` before anything else, from the first place that has one."""
    (tmp_path / "sitecustomize.py").write_text("from pathlib import Path\n"
        "(Path(__file__).parent / 'found').touch()\n")  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with StageProcesses():
        pass
    assert (tmp_path / "found").exists()
