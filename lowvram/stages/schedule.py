"""The model's scheduler, set up as a task asks; what it cannot do is refused by name."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lowvram.errors import ModelError, RequestError, first_line
from lowvram.repository import Model
from lowvram.request.denoise import DenoiseTask
from lowvram.weights.checkpoint import find_class

if TYPE_CHECKING:
    import torch


def scheduler_maker(task: DenoiseTask, model: Model) -> "Callable[[torch.device | str], Any]":
    """Makes fresh schedulers of the model's own kind, after a trial that the request fits it."""
    config = dict(model.config("scheduler"))
    name = str(config.get("_class_name") or "")
    try:
        scheduler_class = find_class(f"diffusers.{name}")
        if not hasattr(scheduler_class, "set_timesteps"):
            raise AttributeError(name)
    except AttributeError:
        raise ModelError(f"the model's scheduler {name!r} is not one of diffusers'") from None

    def make(device: "torch.device | str") -> Any:
        scheduler = scheduler_class.from_config(config)
        _set_timesteps(scheduler, task, device)
        return scheduler

    if task.eta and "eta" not in inspect.signature(make("cpu").step).parameters:
        raise RequestError(f"--eta {task.eta} has no effect with {name}: leave it out")
    return make


def _set_timesteps(scheduler: Any, task: DenoiseTask, device: "torch.device | str") -> None:
    """As asked: by timesteps, by sigmas, or by their number."""
    takes = inspect.signature(scheduler.set_timesteps).parameters
    name = type(scheduler).__name__
    for option, values in (("timesteps", task.timesteps), ("sigmas", task.sigmas)):
        if values and option not in takes:
            raise RequestError(f"{name} takes no explicit {option}: use --steps")
    try:
        if task.timesteps:
            scheduler.set_timesteps(timesteps=list(task.timesteps), device=device)
        elif task.sigmas:
            scheduler.set_timesteps(sigmas=list(task.sigmas), device=device)
        else:
            scheduler.set_timesteps(task.steps, device=device)
    except (ValueError, IndexError) as error:
        raise RequestError(f"{name} refuses these steps: {first_line(error)}") from None


def step_options(scheduler: Any, eta: float, generators: "list[torch.Generator]") -> dict[str, Any]:
    """Of eta and the generators, what this scheduler's `step` takes."""
    takes = inspect.signature(scheduler.step).parameters
    options = {"eta": eta, "generator": generators}
    return {name: value for name, value in options.items() if name in takes}
