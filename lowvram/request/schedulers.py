"""The schedulers that can be asked for, under the names that people know: plain data.

Each name stands for a class of diffusers and the settings that make it what the name says. Which
of them a model's own configuration can become, and what each takes, is found out from diffusers
(`stages/schedule.py`, `stages/scheduler_kinds.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lowvram.errors import RequestError


@dataclass(frozen=True)
class Named:
    """What a name stands for.

    Attributes:
        class_name: in diffusers.
        settings: beside what the model's own configuration says.
        needs: a package that only this one needs; "" for none.
        least_steps: with fewer it cannot start.
        says: what it is, for people.
    """

    class_name: str
    says: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: str = ""
    least_steps: int = 1


def _dpm(algorithm: str, order: int, says: str, kind: str = "Multistep") -> Named:
    settings: dict[str, Any] = {"algorithm_type": algorithm, "solver_order": order}
    if kind == "Singlestep":
        settings["lower_order_final"] = True  # it sets this itself, and complains each time
    return Named(f"DPMSolver{kind}Scheduler", says, settings)


NAMED: Mapping[str, Named] = {
    "dpm++2m": _dpm("dpmsolver++", 2, "DPM-Solver++, second order (arXiv 2211.01095)"),
    "dpm++3m": _dpm("dpmsolver++", 3, "DPM-Solver++, third order"),
    "dpm++2m-sde": _dpm("sde-dpmsolver++", 2, "DPM-Solver++ with noise in each step"),
    "dpm++3m-sde": _dpm("sde-dpmsolver++", 3, "the same, third order"),
    "dpm++2s": _dpm("dpmsolver++", 2, "DPM-Solver++, single step, second order", "Singlestep"),
    "dpm++3s": _dpm("dpmsolver++", 3, "DPM-Solver++, single step, third order", "Singlestep"),
    "dpm++sde": Named(
        "DPMSolverSDEScheduler", "k-diffusion's DPM++ SDE, two calls a step", needs="torchsde"
    ),
    "unipc": Named("UniPCMultistepScheduler", "UniPC (arXiv 2302.04867)"),
    "deis": Named(
        "DEISMultistepScheduler", "DEIS (arXiv 2204.13902)", {"algorithm_type": "deis"}
    ),
    "euler": Named("EulerDiscreteScheduler", "Euler (arXiv 2206.00364)"),
    "euler-a": Named("EulerAncestralDiscreteScheduler", "Euler with noise in each step"),
    "heun": Named("HeunDiscreteScheduler", "Heun (arXiv 2206.00364), two calls a step"),
    "kdpm2": Named("KDPM2DiscreteScheduler", "k-diffusion's DPM2, two calls a step"),
    "kdpm2-a": Named("KDPM2AncestralDiscreteScheduler", "DPM2 with noise in each step"),
    "lms": Named("LMSDiscreteScheduler", "linear multistep, fourth order", needs="scipy"),
    "ddim": Named("DDIMScheduler", "DDIM (arXiv 2010.02502); --eta adds noise"),
    "ddpm": Named("DDPMScheduler", "ancestral sampling (arXiv 2006.11239), for many steps"),
    "pndm": Named(
        "PNDMScheduler", "PNDM with Runge-Kutta at first (arXiv 2202.09778)", least_steps=4
    ),
    "sa": Named(
        "SASolverScheduler", "SA-Solver (arXiv 2309.05019)", {"algorithm_type": "data_prediction"}
    ),
    "lcm": Named("LCMScheduler", "for models distilled to few steps (arXiv 2310.04378)"),
}  # fmt: skip

# Names of the same in other programs.
_ALSO = {
    "dpm-single": "dpm++2s", "dpm-multi": "dpm++2m", "dpm2": "kdpm2", "dpm2-a": "kdpm2-a",
    "sa-solver": "sa", "euler-ancestral": "euler-a",
}  # fmt: skip

REFUSED: Mapping[str, str] = {
    "EDMEulerScheduler": "it scales inputs and times for networks trained as EDM "
    "(arXiv 2206.00364), and what another network predicts grows without bound in it",
}

SPACINGS = ("leading", "trailing", "linspace")
# How noise levels lie between the first and the last, and the setting that says so.
SIGMA_SPACINGS: Mapping[str, str] = {
    "plain": "",
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
}


def scheduler_name(text: str) -> str:
    """The name of a scheduler as listed here, or a class of diffusers; "" for the model's own.

    Raises:
        RequestError: not known, or known not to work.
    """
    wanted = _plain(text)
    if wanted in ("", "default"):
        return ""
    for name in NAMED:
        if wanted == _plain(name):
            return name
    for other, name in _ALSO.items():
        if wanted == _plain(other):
            return name
    for class_name in (*(each.class_name for each in NAMED.values()), *REFUSED):
        if text in (class_name, class_name.removesuffix("Scheduler")):
            return class_name
    if wanted in ("edm", "edmeuler"):
        return "EDMEulerScheduler"
    raise RequestError(
        f"--scheduler {text} is not known: use {', '.join(NAMED)} "
        "(lowvram models --schedulers says what each takes)"
    )


def named(name: str) -> Named:
    """What a name from `scheduler_name` stands for; a class stands for itself.

    Raises:
        RequestError: it is known not to work.
    """
    if name in REFUSED:
        raise RequestError(f"--scheduler {name} is left out: {REFUSED[name]}")
    if name in NAMED:
        return NAMED[name]
    alike = [each for each in NAMED.values() if each.class_name == name]
    if not alike:
        return Named(name, "")
    kept = {"DEISMultistepScheduler", "SASolverScheduler"}  # other classes' values break these
    settings = alike[0].settings if name in kept else {}
    return Named(name, alike[0].says, settings, alike[0].needs, alike[0].least_steps)


def _plain(text: str) -> str:
    return text.strip().lower().replace(" ", "").replace("-", "").replace("_", "")


def check_steps(
    steps: int | None,
    timesteps: Sequence[int] | None,
    sigmas: Sequence[float] | None,
    eta: float,
    spacing: str,
    sigma_spacing: str,
) -> None:
    """Whether what is said of the steps makes sense, whatever the scheduler.

    Raises:
        RequestError: names the value and the way out.
    """
    if (timesteps and sigmas) or (steps is not None and (timesteps or sigmas)):
        raise RequestError("--steps, --timesteps and --sigmas exclude each other: give one")
    for option, values in (("timesteps", timesteps), ("sigmas", sigmas)):
        if values is not None and len(values) == 0:
            raise RequestError(f"{option} are empty: name some, or leave them out")
    if timesteps and list(timesteps) != sorted(set(timesteps), reverse=True):
        raise RequestError(f"timesteps must descend without repeats: {list(timesteps)}")
    if timesteps and not 0 <= min(timesteps) <= max(timesteps) < 1000:
        raise RequestError(f"timesteps must lie between 999 and 0: {list(timesteps)}")
    if sigmas and not all(0 <= low < high < 1e6 for high, low in pairwise((1e5, *sigmas))):
        raise RequestError(f"sigmas must be positive and descend: {list(sigmas)}")
    if not 0 <= eta <= 1:
        raise RequestError(f"--eta {eta} is out of range: 0 to 1")
    if (timesteps or sigmas) and (spacing or sigma_spacing not in ("", "plain")):
        raise RequestError(
            f"--spacing and --sigma-spacing place steps by their number, and "
            f"{'--timesteps' if timesteps else '--sigmas'} gives each: leave one of them out"
        )
