"""The demo's training loop: it goes on where it was stopped, and workers stay together."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lowvram.demo import training
from lowvram.demo.captions import caption
from lowvram.demo.corpus import LABELS, labels_of
from lowvram.demo.reading import asked
from lowvram.demo.scenes import random_scene
from lowvram.demo.training import Log, Plan, fit

FOREVER = 1e9  # seconds


class Stopped(Exception):
    pass


def trained(folder: Path, steps: int, stop: int | None = None) -> tuple[dict[str, Tensor], int]:
    """The weights that a straight line is fitted with, and in how many steps of this call.

    `Stopped` before the step of that number.
    """
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    line = nn.Linear(3, 1)
    taken = 0

    def loss_at(progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal taken
        taken += 1
        if taken == stop:
            raise Stopped
        given = torch.randn(8, 3)
        loss = (line(given) - given.sum(1, keepdim=True)).square().mean()
        return loss, {"loss twice": 2 * loss.detach()}

    plan = Plan("line", 8, steps, FOREVER, {"line": 0.1}, 0.9, 5)
    log = Log(folder / "log.jsonl")
    fit(plan, nn.ModuleDict({"line": line}), loss_at, lambda parts, step: {}, folder, log)
    return dict(line.state_dict()), taken


def test_a_stopped_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_SAVE_EVERY", -1.0)  # seconds: after each step
    whole, _ = trained(tmp_path / "whole", 30)
    with pytest.raises(Stopped):
        trained(tmp_path / "stopped", 30, stop=12)
    resumed, taken = trained(tmp_path / "stopped", 30)
    assert taken == 30 - 11
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not list((tmp_path / "stopped").glob("*.unfinished.pt"))


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    once, _ = trained(tmp_path, 30)
    again, taken = trained(tmp_path, 30, stop=1)
    assert taken == 0
    assert all(torch.equal(once[name], again[name]) for name in once)


WORKER = """
import sys, time
from pathlib import Path
import torch
from torch import distributed as dist, nn
from lowvram.demo.training import Log, Plan, fit, worker

dist.init_process_group("gloo")
torch.manual_seed(worker())
line, taken = nn.Linear(3, 1), []

def loss_at(progress):
    taken.append(progress)
    time.sleep(0.03 * worker())  # seconds: the clocks of the two drift apart
    given = torch.randn(8, 3)
    return (line(given) - given.sum(1, keepdim=True)).square().mean(), {}

folder = Path(sys.argv[1])
plan = Plan("line", 16, 1_000_000, 0.5, {"line": 0.1}, 0.9, 1_000_000)
# Both begin with the first one's weights, as a stage that was stopped does.
for weight in line.parameters():
    dist.broadcast(weight.data, 0)
fit(plan, nn.ModuleDict({"line": line}), loss_at, lambda parts, step: {}, folder, Log(folder / "l"))
torch.save({"steps": len(taken), "weight": line.weight.detach()}, folder / f"end{worker()}.pt")
"""


def test_workers_of_unequal_speed_end_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)], env={**shared, "RANK": str(rank)}
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(120) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait()
    one, two = (torch.load(tmp_path / f"end{rank}.pt") for rank in range(2))
    assert one["steps"] == two["steps"] > 1
    assert torch.equal(one["weight"], two["weight"])


def test_labels_are_what_captions_say() -> None:
    rng = random.Random(0)
    told = 0
    for _ in range(300):
        scene = random_scene(rng)
        said = asked(caption(scene, rng))
        if said is None:
            continue
        labels = {
            name: values[index] if index >= 0 else None
            for (name, values), index in zip(LABELS.items(), labels_of(scene), strict=True)
        }
        things = [(labels["shape"], labels["colour"])]
        if labels["second shape"]:
            things.append((labels["second shape"], labels["second colour"]))
        assert things == [(thing.shape, thing.colour) for thing in said.things]
        assert (labels["count"] or 1) == said.count
        for name in ("background", "place", "relation"):
            if value := getattr(said, name):
                assert labels[name] == value
                told += 1
    assert told > 200
