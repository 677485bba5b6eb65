"""A scheduler tried with a perfect prediction, which it must follow to the end.

A network that knows the picture predicts the noise in it exactly at every step, so that a solver of
any order arrives at the picture, wherever its steps lie. One that does not has a fault with these
settings: diffusers' PNDM on few steps that are spaced evenly, for one, and DPM2 with noise on two,
which divides zero by zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowvram.errors import RequestError, first_line, is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

# Of a picture of 1 and -1. What works stays below 0.07: DEIS ends at the last trained noise level.
_MOST = 0.25


@dataclass(frozen=True)
class Schedule:
    """What a network was trained on.

    Attributes:
        alphas: share of the picture in the variance at each timestep, `[timesteps]`, float64;
            None where the scheduler has no such table.
    """

    alphas: "Tensor | None"

    @staticmethod
    def of(scheduler: Any) -> "Schedule":
        """That of the model's own scheduler."""
        alphas = getattr(scheduler, "alphas_cumprod", None)
        return Schedule(None if alphas is None else alphas.double().cpu())

    def share(self, timestep: "Tensor | float") -> "Tensor":
        """Of the picture, at a timestep that may lie between two, `[]`, float64."""
        import torch

        assert self.alphas is not None
        last = len(self.alphas) - 1
        at = min(max(float(timestep), 0.0), float(last))
        low = int(at)
        high = min(low + 1, last)
        return torch.lerp(self.alphas[low], self.alphas[high], at - low)


def trial(make: Callable[[str], Any], schedule: Schedule) -> None:
    """Refuse a scheduler that goes astray with a perfect prediction.

    Args:
        make: gives a scheduler for a device, its timesteps set.
        schedule: that the network was trained on.

    Raises:
        RequestError: names how far from the picture it ended.
    """
    scheduler = make("cpu")
    if schedule.alphas is None or getattr(scheduler, "alphas_cumprod", None) is None:
        return
    try:
        missed = _missed(scheduler, schedule)
    except (ValueError, IndexError, AssertionError, NotImplementedError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise RequestError(
            f"{type(scheduler).__name__} fails with these steps ({first_line(error)[:100]}): "
            "use another number of --steps, --spacing or --scheduler"
        ) from None
    if not missed <= _MOST:  # NaN fails this too
        raise RequestError(
            f"{type(scheduler).__name__} does not arrive with these {len(scheduler.timesteps)} "
            f"calls: given a perfect prediction it misses a picture of 1 and -1 by {missed:.2g}; "
            "use another number of --steps, --spacing or --scheduler"
        )


def _missed(scheduler: Any, schedule: Schedule) -> float:
    """How far from the picture it ends, at most."""
    import torch

    from lowvram.stages.schedule import step_options

    generator = torch.Generator().manual_seed(0)
    picture = torch.tensor([1.0, -1.0]).repeat(8).reshape(1, 1, 4, 4)
    kind = scheduler.config.get("prediction_type", "epsilon")
    options = step_options(scheduler, 0.0, [generator])
    latents = torch.randn(picture.shape, generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep).double()
        share = schedule.share(timestep)
        noise = (scaled - share.sqrt() * picture) / (1 - share).sqrt()
        predicted = {
            "epsilon": noise,
            "v_prediction": share.sqrt() * noise - (1 - share).sqrt() * picture,
            "sample": picture,
        }.get(kind)
        if predicted is None:
            return 0.0  # another meaning, which is not known here
        latents = scheduler.step(
            predicted.float(), timestep, latents, **options, return_dict=False
        )[0]
    return float((latents - picture).abs().max())
