"""The model's scheduler, or the one that was asked for, set up as a task asks.

What it cannot do is refused by name before anything is loaded. What has to be computed for that is
computed: with steps by number, the scheduler is tried with a perfect prediction, which every one of
them must follow to its end (`trial`).
"""

import inspect
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lowvram.errors import ModelError, RequestError, first_line
from lowvram.repository import Model
from lowvram.request.denoise import DenoiseTask
from lowvram.request.schedulers import NAMED, SIGMA_SPACINGS, SPACINGS, Named, named
from lowvram.stages.trial import Schedule, trial
from lowvram.weights.checkpoint import find_class

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SchedulerMaker:
    """Makes fresh schedulers for a task.

    Attributes:
        settings: what was changed in the model's own configuration.
        ignored: settings of the model's own configuration that change what it computes and that
            this class has not.
    """

    kind: Any
    config: Mapping[str, Any]
    task: DenoiseTask
    settings: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def __call__(self, device: "torch.device | str") -> Any:
        """A scheduler with its timesteps set."""
        scheduler = copy(self._built)
        for name, value in vars(scheduler).items():
            if isinstance(value, list):  # which steps fill in place
                setattr(scheduler, name, list(value))
        _set_timesteps(scheduler, self.task, device)
        if hasattr(scheduler, "set_begin_index"):
            # Else it looks the first timestep up, takes the second of two equal ones (beta sigmas
            # have them), and runs past its end.
            scheduler.set_begin_index(0)
        return scheduler

    @cached_property
    def steps(self) -> int:
        """See `number_of_steps`."""
        return number_of_steps(self.task, self("cpu"))

    def notes(self) -> list[str]:
        """What the model's own scheduler would do and this one does not, for people."""
        return [
            f"{self.kind.__name__} has no {each}, which the model sets" for each in self.ignored
        ]

    @cached_property
    def _built(self) -> Any:
        """Built once: DPM2's constructor alone takes half a second."""
        return build(self.kind, self.config, self.settings)


def number_of_steps(task: DenoiseTask, scheduler: Any) -> int:
    """How many steps are asked for, of which a start leaves some out: explicit timesteps or sigmas
    are as many as the scheduler makes of them, and one of second order has two timesteps a step.

    Args:
        scheduler: with its timesteps set.
    """
    if task.timesteps or task.sigmas:
        return -(-len(scheduler.timesteps) // scheduler.order)
    return task.steps


def scheduler_maker(task: DenoiseTask, model: Model) -> SchedulerMaker:
    """Makes fresh schedulers as the task asks, after a trial that the request fits them.

    Raises:
        RequestError: says what cannot be done, and the way out.
        ModelError: the model's own scheduler is none of diffusers'.
    """
    config, own = own_scheduler(model)
    wanted = named(task.scheduler) if task.scheduler else Named(own.__name__, "")
    kind = scheduler_class(wanted, own, task.scheduler) if task.scheduler else own
    settings = _settings(task, wanted, kind, own, config)
    ignored = unheard(config, kind) if kind is not own else ()
    maker = SchedulerMaker(kind, config, task, settings, ignored)
    if not (task.timesteps or task.sigmas) and task.steps < wanted.least_steps:
        raise RequestError(
            f"{kind.__name__} needs {wanted.least_steps} steps to start, not {task.steps}"
        )
    if task.start and not hasattr(kind, "add_noise"):
        raise RequestError(
            f"{kind.__name__} cannot add noise to a picture (it has no add_noise): "
            "leave --start and --image out, or name another --scheduler"
        )
    scheduler = maker("cpu")
    if task.eta and "eta" not in inspect.signature(scheduler.step).parameters:
        raise RequestError(f"--eta {task.eta} has no effect with {kind.__name__}: leave it out")
    if task.spacing:
        _check_spacing(maker)
    if not (task.timesteps or task.sigmas or task.start):
        _check_start(scheduler)
        trial(maker, Schedule.of(build(own, config, {})))
    return maker


def own_scheduler(model: Model) -> tuple[dict[str, Any], Any]:
    """The configuration and class of the model's own scheduler.

    Raises:
        ModelError: it is none of diffusers'.
    """
    config = dict(model.config("scheduler"))
    name = str(config.get("_class_name") or "")
    try:
        kind = find_class(f"diffusers.{name}")
        if not hasattr(kind, "set_timesteps"):
            raise AttributeError(name)
    except AttributeError:
        raise ModelError(f"the model's scheduler {name!r} is not one of diffusers'") from None
    except ImportError as error:
        raise ModelError(f"the model's {name} cannot be used: {first_line(error)}") from None
    return config, kind


def scheduler_class(wanted: Named, own: Any, name: str) -> Any:
    """The class that a model's configuration is to be turned into.

    Raises:
        RequestError: it cannot be, or a package is missing.
    """
    if wanted.needs and find_spec(wanted.needs) is None:
        raise RequestError(
            f"--scheduler {name} needs the package {wanted.needs}: pip install {wanted.needs}"
        )
    kind = find_class(f"diffusers.{wanted.class_name}")
    # `_compatibles` is what diffusers' `scheduler.compatibles` reads. Those of the common kind
    # share one noise schedule; LCM's and SA-Solver's are the same, and not in that list.
    common = any(each.class_name in own._compatibles for each in NAMED.values())
    if kind is not own and not common:
        raise RequestError(
            f"the model's {own.__name__} cannot become {wanted.class_name}: leave out --scheduler"
        )
    return kind


def build(kind: Any, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """A scheduler from another one's configuration.

    Raises:
        RequestError: the class refuses that.
    """
    try:
        return kind.from_config(dict(config), **settings)
    except (ValueError, NotImplementedError, ImportError) as error:
        raise RequestError(
            f"{kind.__name__} refuses this configuration: {first_line(error)}"
        ) from None


def accepts(kind: Any) -> set[str]:
    """The settings that a class of schedulers has."""
    return set(inspect.signature(kind.__init__).parameters)


def _settings(
    task: DenoiseTask, wanted: Named, kind: Any, own: Any, config: Mapping[str, Any]
) -> dict[str, Any]:
    """What to change in the model's own configuration."""
    takes, name = accepts(kind), kind.__name__
    settings = dict(wanted.settings)
    if kind is not own and "clip_sample" in takes and "clip_sample" not in config:
        # For pixels between -1 and 1: latents reach beyond, and DDIM and DDPM clip by default.
        settings["clip_sample"] = False
    if task.spacing:
        if "timestep_spacing" not in takes:
            raise RequestError(
                f"--spacing {task.spacing}: {name} has one spacing only, leave it out"
            )
        settings["timestep_spacing"] = task.spacing
    if task.sigma_spacing:
        flags = [flag for flag in SIGMA_SPACINGS.values() if flag and flag in takes]
        flag = SIGMA_SPACINGS[task.sigma_spacing]
        if not flags or (flag and flag not in takes):
            known = [each for each, flag in SIGMA_SPACINGS.items() if flag in flags]
            raise RequestError(
                f"--sigma-spacing {task.sigma_spacing} (--karras, --no-karras): {name} "
                f"{'takes ' + ', '.join(known) + ' only' if known else 'has no such setting'}"
            )
        if flag == SIGMA_SPACINGS["beta"] and find_spec("scipy") is None:
            raise RequestError("--sigma-spacing beta needs the package scipy: pip install scipy")
        settings |= {each: each == flag for each in flags}
    return settings


# Settings that change what a scheduler takes the network's prediction for; not how it steps.
_MEANING = ("rescale_betas_zero_snr", "thresholding", "use_flow_sigmas")


def unheard(config: Mapping[str, Any], kind: Any) -> tuple[str, ...]:
    """Settings of a model's configuration that a class of schedulers has not."""
    return tuple(each for each in _MEANING if config.get(each) and each not in accepts(kind))


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
    except (ValueError, IndexError, AttributeError) as error:
        raise RequestError(f"{name} refuses these steps: {first_line(error)}") from None


def _check_spacing(maker: SchedulerMaker) -> None:
    """Refuse a spacing that changes nothing: noise levels may be spread without it."""
    if not heeds_spacing(
        maker("cpu"), lambda scheduler: _set_timesteps(scheduler, maker.task, "cpu")
    ):
        levels = "--karras" if maker.task.sigma_spacing == "karras" else "--sigma-spacing"
        beside = f" beside {levels}" if maker.task.sigma_spacing else ""
        raise RequestError(
            f"--spacing {maker.task.spacing} has no effect on {maker.kind.__name__}{beside}: "
            "leave it out"
        )


def heeds_spacing(scheduler: Any, set_timesteps: Callable[[Any], None]) -> bool:
    """Whether the spacing makes a difference to a scheduler, which is spoilt by the question."""
    made = []
    for each in SPACINGS:
        scheduler.register_to_config(timestep_spacing=each)
        set_timesteps(scheduler)
        made.append(scheduler.timesteps.tolist())
    return not made[0] == made[1] == made[2]


def _check_start(scheduler: Any) -> None:
    """Refuse to start where hardly any noise is left: a single step of some spacings does."""
    first, all_steps = float(scheduler.timesteps.max()), scheduler.config.num_train_timesteps
    if first < all_steps / 100:
        raise RequestError(
            f"{type(scheduler).__name__} would start at timestep {first:g} of {all_steps}, where "
            "no noise is left to take away: use --spacing trailing, or more --steps"
        )


def step_options(scheduler: Any, eta: float, generators: "list[torch.Generator]") -> dict[str, Any]:
    """Of eta and the generators, what this scheduler's `step` takes."""
    if hasattr(scheduler, "noise_sampler_seed"):  # its own source of noise, one for each picture
        scheduler.noise_sampler_seed = [each.initial_seed() for each in generators]
    takes = inspect.signature(scheduler.step).parameters
    options = {"eta": eta, "generator": generators}
    return {name: value for name, value in options.items() if name in takes}
