"""Stop and go on in the middle of denoising: everything a run of steps carries, in one file.

A step of a multistep scheduler depends on what its last steps left in it, one with noise on how far
its generators have come. So a checkpoint holds the latents, the scheduler's whole state (all of its
attributes that differ from a fresh one's), the generators' states, and the finished pictures. Going
on from it gives bit for bit what never stopping gives.

It is an artifact of its own kind, written atomically and verified before use. It says what it is a
part of: model, settings, pictures and embeddings, as the latents' header will, and the versions of
torch and diffusers. One that is a part of anything else is not used.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts
from lowvram.errors import ArtifactError, RequestError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KIND = "checkpoint"
SUFFIX = ".checkpoint.safetensors"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """A place in the middle of denoising.

    Attributes:
        finished: latents of the batches before, `[pictures, channels, height, width]`, on the host;
            no pictures in the first batch.
        latents: of this batch, after `step` calls of the network.
        state: what of the scheduler is not as in a fresh one.
        generators: state of each picture's generator.
    """

    finished: "Tensor"
    latents: "Tensor"
    step: int
    state: dict[str, Any]
    generators: "list[Tensor]"


class Checkpoints:
    """Writes a point every few steps, and finds the last one again."""

    def __init__(self, latents: Path, header: artifacts.Header, every: int) -> None:
        """
        Args:
            latents: the file that is being made; checkpoints lie beside it.
            header: as that file will have it, but for its tensors.
            every: calls of the network between checkpoints; 0 for none, neither read nor written.
        """
        name = latents.name.removesuffix(artifacts.SUFFIXES["latents"])
        self.path = latents.with_name(name.removesuffix(".safetensors") + SUFFIX)
        self._header, self._every = header, every
        self._versions = {name: version(name) for name in ("torch", "diffusers")}

    def find(self) -> "Point | None":
        """The last point of this very work, None to start at the beginning; the log says which."""
        if not self._every or not self.path.exists():
            return None
        try:
            header, tensors = artifacts.read(self.path, KIND)
            other = self._differs(header)
        except ArtifactError as error:
            log.warning("%s; starting from the first step", error)
            return None
        if other:
            log.warning("%s is not used (%s): starting from the first step", self.path, other)
            return None
        point = header.settings["point"]
        log.info("going on from %s, step %d", self.path, point["step"])
        return Point(
            tensors["finished"],
            tensors["latents"],
            point["step"],
            _restored(point["state"], tensors),
            [tensors[f"generator.{index}"] for index in range(point["generators"])],
        )

    def due(self, done: int) -> bool:
        """Whether a point is to be written after so many calls of the network in all."""
        return bool(self._every) and done % self._every == 0

    def write(self, point: Point) -> None:
        """Replace the last point by this one.

        Raises:
            StorageError: no space, or the folder cannot be written.
            RequestError: the scheduler keeps what no checkpoint can hold.
        """
        tensors = {"finished": point.finished, "latents": point.latents}
        tensors |= {f"generator.{i}": each for i, each in enumerate(point.generators)}
        described = {
            "step": point.step,
            "generators": len(point.generators),
            "state": _described(point.state, "state", tensors),
        }
        header = artifacts.Header(
            KIND,
            self._header.model,
            {"of": self._header.settings, "versions": self._versions, "point": described},
            self._header.items,
            self._header.made_from,
        )
        # Cloned: what the scheduler keeps may share memory, which the format does not allow.
        artifacts.write(self.path, header, {k: v.cpu().clone() for k, v in tensors.items()})

    def remove(self) -> None:
        """The work is done."""
        if self._every:
            self.path.unlink(missing_ok=True)

    def _differs(self, found: artifacts.Header) -> str:
        """What the file is a part of that this work is not; "" for the same."""
        ours = self._header
        if found.made_from != ours.made_from:
            return "it was made from other embeddings"
        if found.model != ours.model:
            return "it was made with another model"
        if found.items != ours.items:
            return "it was made for other prompts or seeds"
        for name, theirs in found.settings["versions"].items():
            if theirs != self._versions.get(name):
                return f"it was written by {name} {theirs}"
        before = found.settings["of"]
        for name in sorted({*before, *ours.settings}):
            if before.get(name) != ours.settings.get(name):
                return f"its {name} was {before.get(name)} and is {ours.settings.get(name)} now"
        return ""


@dataclass(frozen=True)
class Keeper:
    """Where one batch begins, and what is kept of it on its way.

    Attributes:
        make_scheduler: gives a fresh one.
        finished: latents of the pictures before this batch.
        pictures: in all.
        steps: of a picture.
        point: to go on from; None to start at the beginning.
    """

    checkpoints: Checkpoints
    make_scheduler: Callable[[], Any]
    finished: "Sequence[Tensor]"
    batch_size: int
    pictures: int
    steps: int
    point: Point | None

    def start(
        self, noise: "Tensor", scheduler: Any, generators: "Sequence[torch.Generator]"
    ) -> "tuple[Tensor, int]":
        """Latents and the number of steps behind them; scheduler and generators as they were."""
        if self.point is None:
            return noise, 0
        set_state(scheduler, self.point.state, noise.device)
        for generator, state in zip(generators, self.point.generators, strict=True):
            generator.set_state(state)
        return self.point.latents.to(noise.device), self.point.step

    def keep(
        self,
        step: int,
        latents: "Tensor",
        scheduler: Any,
        generators: "Sequence[torch.Generator]",
    ) -> None:
        """Write a point if one is due; not after the very last step."""
        last = step == self.steps and len(self.finished) + len(latents) == self.pictures
        if last or not self.checkpoints.due(
            len(self.finished) // self.batch_size * self.steps + step
        ):
            return
        import torch

        before = [latents.new_empty((0, *latents.shape[1:]), device="cpu"), *self.finished]
        self.checkpoints.write(
            Point(
                torch.cat(before),
                latents,
                step,
                state_of(scheduler, self.make_scheduler()),
                [each.get_state() for each in generators],
            )
        )


def state_of(scheduler: Any, fresh: Any) -> dict[str, Any]:
    """What the steps so far have left in a scheduler.

    Args:
        fresh: another one, just made for the same task.
    """
    before = vars(fresh)
    return {
        name: value
        for name, value in vars(scheduler).items()
        if name not in _REMADE and not (name in before and _same(value, before[name]))
    }


def set_state(scheduler: Any, state: dict[str, Any], device: "torch.device") -> None:
    """Make a fresh scheduler what another was when `state_of` looked at it."""
    for name, value in state.items():
        setattr(scheduler, name, _moved(value, device))


# DPMSolverSDE's Brownian path: a function of seed and time alone, made anew when it is needed.
_REMADE = ("noise_sampler", "noise_sampler_seed")


def _same(one: Any, other: Any) -> bool:
    import numpy as np
    import torch

    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if callable(one):  # SA-Solver's choice of noise by time, made anew with each
        return True
    return bool(one == other)


def _described(value: Any, name: str, tensors: "dict[str, Tensor]") -> Any:
    """The value as JSON types, its tensors put among `tensors`.

    Raises:
        RequestError: a scheduler keeps what is not known here.
    """
    import torch

    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name, "on_host": value.device.type == "cpu"}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        parts = [_described(each, f"{name}.{i}", tensors) for i, each in enumerate(value)]
        return {"list": parts} if isinstance(value, list) else {"tuple": parts}
    if isinstance(value, dict):
        return {"dict": {k: _described(v, f"{name}.{k}", tensors) for k, v in value.items()}}
    raise RequestError(
        f"this scheduler keeps a {type(value).__name__} ({name}), which no checkpoint can hold: "
        "leave out --checkpoint-every"
    )


def _restored(value: Any, tensors: "dict[str, Tensor]") -> Any:
    """What `_described` described, as `_moved` takes it."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return _Placed(tensors[value["tensor"]], value["on_host"])
    if "dict" in value:
        return {k: _restored(v, tensors) for k, v in value["dict"].items()}
    if "list" in value:
        return [_restored(each, tensors) for each in value["list"]]
    return tuple(_restored(each, tensors) for each in value["tuple"])


@dataclass(frozen=True)
class _Placed:
    """A tensor that was on the host, or on the device."""

    tensor: "Tensor"
    on_host: bool


def _moved(value: Any, device: "torch.device") -> Any:
    if isinstance(value, _Placed):
        return value.tensor if value.on_host else value.tensor.to(device)
    if isinstance(value, list | tuple):
        return type(value)(_moved(each, device) for each in value)
    if isinstance(value, dict):
        return {name: _moved(each, device) for name, each in value.items()}
    return value
