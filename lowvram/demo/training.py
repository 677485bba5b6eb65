"""One training loop for every stage of the demo model: resumable, on time, logged.

It knows neither pictures nor captions; `scripts/train_demo.py` brings the losses. Under `torchrun`
every process (a worker) trains on its own batches and gradients are averaged. On two busy cores
two workers of one thread each waste less than one worker with two threads, whose every operation
waits for the slower thread. A GPU is used where there is one, by one process.
"""

import copy
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist

Figures = dict[str, float]
LossAt = Callable[[float], tuple[Tensor, dict[str, Tensor]]]
Watch = Callable[[nn.ModuleDict, int], Figures]

_WARM_UP = 0.06  # share of the stage
_LOG_EVERY = 20  # steps
_SAVE_EVERY = 180.0  # seconds


@dataclass(frozen=True)
class Plan:
    """How long a stage trains, and how fast.

    A stage is over after `steps` or after `seconds` of its own time, whichever comes first; the
    cosine schedule follows whichever is further, so that it always ends at the end. `rates` holds
    the peak learning rate of each trained part.
    """

    name: str
    batch: int  # of all workers together
    steps: int
    seconds: float
    rates: dict[str, float]
    averaging: float  # decay of the moving average of the weights
    watch_every: int  # steps


class Log:
    """A JSON-lines file with one entry per logged step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, stage: str, step: int, seconds: float, **figures: float) -> None:
        """Append an entry; `seconds` is the stage's own training time so far."""
        rounded = {name: round(value, 5) for name, value in figures.items()}
        entry = {"stage": stage, "step": step, "seconds": round(seconds, 1), **rounded}
        with self.path.open("a") as lines:
            lines.write(json.dumps(entry) + "\n")


def device() -> torch.device:
    """Where training runs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def worker() -> int:
    """This process's number, 0 where there is one process only."""
    return dist.get_rank() if dist.is_initialized() else 0


def workers() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Return once every worker has come here."""
    if dist.is_initialized():
        dist.barrier()


def fit(
    plan: Plan, parts: nn.ModuleDict, loss_at: LossAt, watch: Watch, folder: Path, log: Log
) -> None:
    """Train `parts` in place and leave the averaged weights in them.

    `loss_at(progress)` gives the loss of one batch; all randomness comes from torch's global
    generator, seeded by step and worker, so a resumed run sees the same data.
    `watch(averaged parts, step)` gives held-out figures for the log. A finished stage is loaded
    from `folder` instead of trained again.
    """
    finished, unfinished = folder / f"{plan.name}.pt", folder / f"{plan.name}.unfinished.pt"
    if finished.exists():
        parts.load_state_dict(torch.load(finished, weights_only=True, map_location=device()))
        return
    groups = [
        {"params": parts[name].parameters(), "peak": rate} for name, rate in plan.rates.items()
    ]
    fused = device().type == "cuda"
    optimizer = torch.optim.AdamW(groups, 0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=fused)
    averaged = copy.deepcopy(parts).requires_grad_(False)
    step, spent, saved = 0, 0.0, 0.0
    if unfinished.exists():
        state = torch.load(unfinished, weights_only=True, map_location=device())
        parts.load_state_dict(state["parts"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
        saved = spent
    while True:
        spent = _as_the_first(spent)  # or workers end at different steps, and wait for ever
        progress = max(step / plan.steps, spent / plan.seconds)
        if progress >= 1.0:
            break
        began = time.monotonic()
        torch.manual_seed(step * workers() + worker())
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _rate(progress)
        loss, figures = loss_at(progress)
        optimizer.zero_grad()
        loss.backward()
        _average_gradients(parts)
        norm = nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        _average(averaged, parts, min(plan.averaging, (1 + step) / (10 + step)))
        step += 1
        if step % _LOG_EVERY == 0 and worker() == 0:
            seen = {name: value.item() for name, value in figures.items()}
            log.write(plan.name, step, spent, loss=loss.item(), norm=norm.item(), **seen)
        if step % plan.watch_every == 0 and worker() == 0:
            log.write(plan.name, step, spent, **watch(averaged, step))
        spent += time.monotonic() - began
        if spent - saved > _SAVE_EVERY and worker() == 0:
            saved = spent
            state = {"parts": parts.state_dict(), "averaged": averaged.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "step": step, "seconds": spent}
            save(state, unfinished)
    parts.load_state_dict(averaged.state_dict())
    if worker() == 0:
        log.write(plan.name, step, spent, **watch(parts, step))
        save(parts.state_dict(), finished)
        unfinished.unlink(missing_ok=True)
    wait_for_all()


def save(state: Mapping[str, object], path: Path) -> None:
    """Write atomically: a stop leaves the old file or the new one, never half of one."""
    draft = path.with_suffix(".draft")
    torch.save(state, draft)
    os.replace(draft, path)


def _as_the_first(value: float) -> float:
    """The first worker's value, for all to agree."""
    if not dist.is_initialized():
        return value
    told = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(told, 0)
    return float(told)


def _average_gradients(parts: nn.Module) -> None:
    """Average gradients over the workers."""
    if not dist.is_initialized():
        return
    gradients = [weight.grad for weight in parts.parameters() if weight.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    together /= workers()
    pieces = together.split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


def _rate(progress: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to one hundredth."""
    if progress < _WARM_UP:
        return max(progress / _WARM_UP, 0.01)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))


@torch.no_grad()
def _average(averaged: nn.Module, current: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(averaged.parameters()), list(current.parameters()), 1.0 - decay)
