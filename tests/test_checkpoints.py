"""Stopped at any step and gone on from there, denoising gives the bytes of never having stopped."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import lowvram
from lowvram import artifacts, errors
from lowvram.progress import Progress
from lowvram.request.schedulers import NAMED

HERE = [each for each in NAMED if find_spec(NAMED[each].needs or "torch")]
STEPS = 4
SMALL = {"size": (64, 64), "binning": False, "steps": STEPS}


class Stopped(Exception):
    """By the test, as anything may stop a process."""


class StopAt:
    """Stops the denoising at its n-th step in this call."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, progress: Progress) -> None:
        self.left -= progress.doing == "denoising"
        if self.left == 0:
            raise Stopped


@pytest.fixture(scope="module")
def embeds(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "x.embeds.safetensors"
    lowvram.encode(["a red circle", "a star"], str(tiny), output=path, dtype="fp32")
    return path


def step_by_step(embeds: Path, latents: Path, **options: Any) -> int:
    """Every call makes one step and is stopped in the next; how many calls it took."""
    for calls in range(1, 99):
        try:
            lowvram.denoise(
                embeds, output=latents, checkpoint_every=1, on_progress=StopAt(2), **options
            )
            return calls
        except Stopped:
            assert latents.with_name("x.checkpoint.safetensors").exists()
    raise AssertionError("it makes no way")


@pytest.mark.parametrize("name", HERE)
def test_every_scheduler_goes_on_from_every_step(name: str, embeds: Path, tmp_path: Path) -> None:
    options = {**SMALL, "scheduler": name, "seed": 3, "batch_size": 2, "guidance_scale": 1.0}
    if name == "ddim":
        options["eta"] = 0.5
    whole, parts = tmp_path / "whole.latents.safetensors", tmp_path / "x.latents.safetensors"
    lowvram.denoise(embeds, output=whole, **options)
    calls = step_by_step(embeds, parts, **options)
    assert calls >= STEPS
    assert parts.read_bytes() == whole.read_bytes()
    assert sorted(tmp_path.iterdir()) == [whole, parts]  # the checkpoint is gone


def test_finished_pictures_are_kept(embeds: Path, tmp_path: Path) -> None:
    options = {**SMALL, "steps": 3, "scheduler": "euler-a", "images_per_prompt": 2, "seed": [1, 2]}
    whole, parts = tmp_path / "whole.latents.safetensors", tmp_path / "x.latents.safetensors"
    lowvram.denoise(embeds, output=whole, **options)
    assert step_by_step(embeds, parts, **options) == 4 * 3
    assert parts.read_bytes() == whole.read_bytes()


def test_it_goes_on_from_the_last_of_every_few(embeds: Path, tmp_path: Path) -> None:
    latents, seen = tmp_path / "x.latents.safetensors", []
    options = {**SMALL, "checkpoint_every": 2, "seed": [1, 2]}
    with pytest.raises(Stopped):
        lowvram.denoise(embeds, output=latents, on_progress=StopAt(4), **options)
    lowvram.denoise(
        embeds,
        output=latents,
        callback=lambda step, timestep, latents: seen.append(step),
        **options,
    )
    assert seen == [2, 3, *3 * [0, 1, 2, 3]]


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"steps": 6}, "its steps was 4 and is 6 now"),
    "seed": ({"seed": 8}, "it was made for other prompts or seeds"),
    "scheduler": ({"scheduler": "euler"}, "its scheduler was DPMSolver.* and is Euler"),
    "weights": ({"weights": "stream"}, "its weights was whole and is stream now"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_one_of_something_else_is_not_used(
    name: str, embeds: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other, says = OTHERS[name]
    latents, plain = tmp_path / "x.latents.safetensors", tmp_path / "plain.latents.safetensors"
    with pytest.raises(Stopped):
        lowvram.denoise(embeds, output=latents, checkpoint_every=1, on_progress=StopAt(3), **SMALL)
    options = {**SMALL, **other}
    lowvram.denoise(embeds, output=latents, checkpoint_every=1, **options)
    lowvram.denoise(embeds, output=plain, **options)
    assert latents.read_bytes() == plain.read_bytes()
    assert any(re.search(f"is not used .{says}", each) for each in caplog.messages)


def test_other_embeddings_and_damage(
    tiny: Path, embeds: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    latents, checkpoint = tmp_path / "x.latents.safetensors", tmp_path / "x.checkpoint.safetensors"
    with pytest.raises(Stopped):
        lowvram.denoise(embeds, output=latents, checkpoint_every=1, on_progress=StopAt(3), **SMALL)
    kept = checkpoint.read_bytes()
    again = tmp_path / "again.embeds.safetensors"
    lowvram.encode(["a red circle", "a heart"], str(tiny), output=again, dtype="fp32")
    lowvram.denoise(again, output=latents, checkpoint_every=1, **SMALL)
    assert any("it was made from other embeddings" in each for each in caplog.messages)

    checkpoint.write_bytes(kept[:-3] + b"abc")
    lowvram.denoise(embeds, output=latents, checkpoint_every=1, **SMALL)
    assert any("is damaged" in each and "first step" in each for each in caplog.messages)
    checkpoint.write_bytes(kept)
    with pytest.raises(errors.ArtifactError, match="holds a checkpoint, but latents are needed"):
        lowvram.decode(checkpoint, output=tmp_path / "x.png")


KILLED = """
import os, signal, sys
import lowvram
embeds, folder, steps = sys.argv[1], sys.argv[2], 3
def denoise(name, kill):
    def at(step, timestep, latents):
        if step == kill:
            os.kill(os.getpid(), signal.SIGKILL)
    lowvram.denoise(embeds, output=f"{folder}/{name}.latents.safetensors", steps=steps,
        size=(64, 64), binning=False, seed=[1, 2], checkpoint_every=1, callback=at)
def forked(name, kill):
    child = os.fork()
    if child == 0:
        denoise(name, kill)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
denoise("whole", None)  # here, so that those below need not import everything again
for kill in range(steps):
    assert forked(f"killed-{kill}", kill) == -signal.SIGKILL
    assert forked(f"killed-{kill}", None) == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_process_killed_at_each_step(embeds: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", KILLED, str(embeds), str(tmp_path)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # no threads to lose in a fork
    )
    made = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 4
    assert len(made) == 1


def test_a_run_goes_on(tiny: Path, tmp_path: Path) -> None:
    """The same command: encodes again, and denoises from where it was stopped."""
    made = {}
    for name in ("whole", "x"):
        picture = tmp_path / f"{name}.png"
        options = {**SMALL, "checkpoint_every": 2, "in_process": True}
        if name == "x":
            with pytest.raises(Stopped):
                lowvram.run("a cat", str(tiny), picture, on_progress=StopAt(4), **options)
            assert (tmp_path / "x.checkpoint.safetensors").exists()
        done: list[int] = []
        result = lowvram.run(
            "a cat",
            str(tiny),
            picture,
            on_progress=lambda each, done=done: (
                done.append(each.done) if each.doing == "denoising" else None
            ),
            **options,
        )
        made[name] = (picture.read_bytes(), artifacts.read_header(result.images[0].latents).key)
        assert done == ([1, 2, 3, 4] if name == "whole" else [3, 4])
    assert made["x"] == made["whole"]
    assert not (tmp_path / "x.checkpoint.safetensors").exists()
