"""The schedulers that a model's own configuration can become, and what each of them takes."""

import inspect
from dataclasses import dataclass
from typing import Any

from lowvram.errors import RequestError
from lowvram.repository import Model
from lowvram.request.schedulers import NAMED, REFUSED, SIGMA_SPACINGS, Named
from lowvram.stages.schedule import (
    accepts,
    build,
    heeds_spacing,
    own_scheduler,
    scheduler_class,
    unheard,
)


@dataclass(frozen=True)
class Kind:
    """One scheduler.

    Attributes:
        spacing: whether it takes --spacing.
        sigma_spacings: of --sigma-spacing; empty where it has no such setting.
        timesteps, sigmas, eta: whether it takes these.
        noise: whether it adds noise in each step, by itself.
        order: calls of the network for one step.
        ignores: settings of the model that it has not.
        refused: why it cannot be used here; "" where it can.
        own: whether it is the model's own, without --scheduler.
    """

    name: str
    class_name: str
    says: str
    spacing: bool = False
    sigma_spacings: tuple[str, ...] = ()
    timesteps: bool = False
    sigmas: bool = False
    eta: bool = False
    noise: bool = False
    order: int = 1
    ignores: tuple[str, ...] = ()
    refused: str = ""
    own: bool = False


# Those whose steps draw from the generators that they take; the others take them for nothing.
_NOISY = ("EulerAncestral", "KDPM2Ancestral", "DDPM", "SASolver", "LCM", "DPMSolverSDE")


def kinds_of(model: Model) -> list[Kind]:
    """The model's own scheduler first, then all that have a name, also those that are refused.

    Raises:
        ModelError: the model's own is none of diffusers'.
    """
    config, own = own_scheduler(model)
    first = _kind("default", Named(own.__name__, "the model's own"), own, config, own)
    kinds = [first]
    for name, wanted in NAMED.items():
        try:
            kind = scheduler_class(wanted, own, name)
            kinds.append(_kind(name, wanted, kind, config, own))
        except RequestError as error:
            kinds.append(Kind(name, wanted.class_name, wanted.says, refused=str(error)))
    for class_name, reason in REFUSED.items():
        kinds.append(Kind(class_name, class_name, "", refused=reason))
    return kinds


def _kind(name: str, wanted: Named, kind: Any, config: dict[str, Any], own: Any) -> Kind:
    takes = accepts(kind)
    scheduler = build(kind, config, dict(wanted.settings))
    flags = {each: flag for each, flag in SIGMA_SPACINGS.items() if flag in takes}
    algorithm = str(scheduler.config.get("algorithm_type", ""))
    return Kind(
        name,
        kind.__name__,
        wanted.says,
        spacing="timestep_spacing" in takes
        and heeds_spacing(scheduler, lambda each: each.set_timesteps(10)),
        sigma_spacings=(*(("plain",) if flags else ()), *flags),
        timesteps=_sets(scheduler, timesteps=[900, 500, 100]),
        sigmas=_sets(scheduler, sigmas=[9.0, 3.0, 0.0]),
        eta="eta" in inspect.signature(kind.step).parameters,
        noise=kind.__name__.startswith(_NOISY) or algorithm.startswith("sde"),
        order=int(kind.order),
        ignores=unheard(config, kind) if kind is not own else (),
        own=name == "default",
    )


def _sets(scheduler: Any, **steps: Any) -> bool:
    """Whether explicit steps of a kind are taken: by its word, and by trying."""
    if not set(steps) <= set(inspect.signature(scheduler.set_timesteps).parameters):
        return False
    try:
        scheduler.set_timesteps(**steps, device="cpu")
    except (ValueError, IndexError, AttributeError, TypeError):
        return False
    return True
