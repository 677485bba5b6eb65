"""What was asked of the denoise stage."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from lowvram.errors import ModelError, RequestError
from lowvram.families.family import Family, Size
from lowvram.repository import Model
from lowvram.request.between import check_between
from lowvram.request.checks import artifact, budget, in_range, one_of
from lowvram.request.encode import DTYPES
from lowvram.request.schedulers import SIGMA_SPACINGS, SPACINGS, check_steps, scheduler_name
from lowvram.request.seeds import seeds_of_pictures
from lowvram.request.start import (
    SavedLatents,
    check_pictures,
    check_rendered,
    check_strength,
    read_start,
)

log = logging.getLogger(__name__)

TRANSFORMER_WEIGHTS = ("auto", "whole", "stream")


@dataclass(frozen=True)
class DenoiseTask:
    """Everything the denoise stage needs. See `resolve_denoise`."""

    model: dict[str, Any]
    embeds: str
    output: str
    seeds: tuple[int, ...]  # one per picture, prompt by prompt
    images_per_prompt: int
    steps: int
    timesteps: tuple[int, ...]  # empty: the scheduler's own
    sigmas: tuple[float, ...]  # likewise
    guidance_scale: float
    aesthetic_scores: tuple[float, ...]  # with the prompt, with the negative; or empty
    requested: tuple[int, int]  # width, height in px
    rendered: tuple[int, int]
    eta: float
    scheduler: str  # "" for the model's own
    spacing: str  # of timesteps, "" for the model's own
    sigma_spacing: str  # likewise, of noise levels
    latents: str  # a file of starting latents, "" to draw them
    start: str  # a file of finished latents to start from, "" for none
    start_picture: int  # which of them all start from, -1 where each has its own
    strength: float  # part of the steps that is done from there; 1.0 without a start
    towards: int | None  # the second seed; None for none
    at: tuple[float, ...]  # between the seeds, one per picture; empty without a second one
    weights: str
    dtype: str
    device: str
    batch_size: int
    checkpoint_every: int  # steps, 0 for never
    preview: int  # likewise
    vram: int
    stage_budget: int
    steps_down: int

    @property
    def asks_the_scheduler(self) -> bool:
        """Whether only the model's scheduler, or a file, can tell if this can be done."""
        return bool(
            self.timesteps
            or self.sigmas
            or self.eta
            or self.latents
            or self.start
            or self.scheduler
            or self.spacing
            or self.sigma_spacing
            or self.steps < 5  # with which some cannot start, or do not arrive
        )


class DenoiseOptions(TypedDict, total=False):
    """What may be asked for; see `resolve_denoise`."""

    seed: int | Sequence[int]
    images_per_prompt: int | None
    steps: int | None
    timesteps: Sequence[int] | None
    sigmas: Sequence[float] | None
    guidance_scale: float | None
    aesthetic_scores: Sequence[float] | None
    size: Size | tuple[int, int] | None
    binning: bool
    eta: float
    scheduler: str
    spacing: str
    sigma_spacing: str
    latents: str | Path | None
    start: str | Path | SavedLatents | None
    start_picture: int | None
    strength: float | None
    towards: int | None
    at: Sequence[float] | None
    weights: str
    dtype: str
    device: str
    batch_size: int
    checkpoint_every: int
    preview: int
    vram: int | None
    stage_budget: int | None


def resolve_denoise(
    embeds: str | Path,
    model: Model,
    output: str | Path,
    *,
    prompts: int,
    seed: int | Sequence[int] = 0,
    images_per_prompt: int | None = None,
    steps: int | None = None,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    guidance_scale: float | None = None,
    aesthetic_scores: Sequence[float] | None = None,
    size: Size | tuple[int, int] | None = None,
    binning: bool = True,
    eta: float = 0.0,
    scheduler: str = "",
    spacing: str = "",
    sigma_spacing: str = "",
    latents: str | Path | None = None,
    start: str | Path | SavedLatents | None = None,
    start_picture: int | None = None,
    strength: float | None = None,
    towards: int | None = None,
    at: Sequence[float] | None = None,
    weights: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    batch_size: int = 1,
    checkpoint_every: int = 0,
    preview: int = 0,
    vram: int | None = None,
    stage_budget: int | None = None,
) -> DenoiseTask:
    """Check what was asked of the denoise stage.

    Args:
        embeds: path of the encode stage's file.
        prompts: how many prompts that file holds.
        seed: of the first picture of each prompt, the next ones count up; or one per picture of a
            prompt; or one per picture in all, prompt by prompt.
        images_per_prompt: None for one, or as many as there are seeds.
        steps: None for the model's default; or give `timesteps` (descending) or `sigmas`. A model
            that was distilled for certain timesteps has them by default.
        guidance_scale: None for the model's default; 1 or less turns guidance off.
        aesthetic_scores: how beautiful (0 to 10) the picture shall be, and what the negative prompt
            describes; None for the model's defaults. For models that are told.
        size: width and height in px; None for the model's own.
        binning: compute at the nearest size the model was trained on, resize after decoding.
        eta: noise added in each step, for schedulers that take it (DDIM).
        scheduler: a name from `request.schedulers.NAMED`, a class of diffusers, or "" for the
            model's own.
        spacing: of timesteps: "leading", "trailing" or "linspace"; "" for the model's own.
        sigma_spacing: of the noise levels between first and last: "karras", "exponential", "beta",
            "lu", or "plain" as the timesteps have them; "" for the model's own.
        latents: a safetensors file with `latents` `[pictures, channels, height, width]`, standard
            normal, to start from instead of drawing noise.
        start: what encode-image wrote of a picture, or denoise of earlier ones: noise is added to
            it, and the last part of the steps is done. Gives the size, unless `size` does. A file
            that is not written yet is described.
        start_picture: which picture of that file, from 0; None for the only one, or, where it holds
            as many as are made, for each its own.
        strength: how much of the steps is done, more than 0 to 1, where all is done; None for the
            family's default.
        towards: a second seed. The noise of each picture then lies between those of `seed` and
            this one (spherical interpolation).
        at: where between the two, 0 to 1, one for each picture of a prompt; None for five.
        weights: how the transformer's weights sit; "auto" takes whole where it fits, else
            stream.
        batch_size: pictures per call of the transformer.
        checkpoint_every: steps after which everything is saved beside the output, so that the same
            call goes on from there; 0 for never.
        preview: steps after which x.preview.png is written beside the output; 0 for never.
        vram: bytes that the process may take on the device; None for what is free.
        stage_budget: bytes that tensors may take there, which counts instead; None for none.

    Raises:
        RequestError: names the value and the way out.
    """
    places = check_between(seed, images_per_prompt, towards, at, latents)
    if places and not isinstance(seed, Sequence):
        seed = [seed] * len(places)
    seeds, images = seeds_of_pictures(seed, images_per_prompt, prompts)
    if model.timesteps and steps is None and timesteps is None and sigmas is None:
        timesteps = model.timesteps
    check_steps(steps, timesteps, sigmas, eta, spacing, sigma_spacing)
    family = model.get_family()
    if start is None and family.needs_start:
        raise RequestError(
            f"{model.name} works on pictures that are there: lowvram refine x.png PROMPT "
            f"-m {model.name}, or denoise with --start"
        )
    begun = read_start(start, model) if isinstance(start, str | Path) else start
    requested, rendered = _sizes(model, size, binning, begun)
    number = in_range("--steps", model.steps if steps is None else steps, 1, 1000)
    if begun is not None:
        check_rendered(begun, rendered, requested)
        start_picture = check_pictures(begun, start_picture, len(seeds))
        strength = family.default_strength if strength is None else strength
        strength = check_strength(strength, len(timesteps or sigmas or ()) or number)
    elif start_picture is not None or strength is not None:
        raise RequestError("--strength and --start-picture need --start or --image: name one")
    chosen_guidance = model.guidance_scale if guidance_scale is None else guidance_scale
    if not 0 <= chosen_guidance <= 100:  # NaN fails this too
        raise RequestError(f"--guidance {guidance_scale} is out of range: 0 to 100")
    if latents is not None and not os.path.isfile(latents):
        raise RequestError(f"starting latents {latents} do not exist: check --latents")
    return DenoiseTask(
        model=model.record(),
        embeds=str(embeds),
        output=artifact(output, embeds, latents, None if begun is None else begun.path),
        seeds=seeds,
        images_per_prompt=images,
        steps=number,
        timesteps=tuple(timesteps or ()),
        sigmas=tuple(float(sigma) for sigma in sigmas or ()),
        guidance_scale=float(chosen_guidance),
        aesthetic_scores=_aesthetic_scores(aesthetic_scores, model.get_family()),
        requested=(requested.width, requested.height),
        rendered=(rendered.width, rendered.height),
        eta=float(eta),
        scheduler=scheduler_name(scheduler),
        spacing=one_of("--spacing", spacing, SPACINGS) if spacing else "",
        sigma_spacing=one_of("--sigma-spacing", sigma_spacing, tuple(SIGMA_SPACINGS))
        if sigma_spacing
        else "",
        latents="" if latents is None else str(latents),
        start="" if begun is None else begun.path,
        start_picture=-1 if start_picture is None else start_picture,
        strength=1.0 if strength is None else strength,
        towards=towards,
        at=places * prompts,
        weights=one_of("--weights", weights, TRANSFORMER_WEIGHTS),
        dtype=one_of("--dtype", dtype, DTYPES),
        device=device,
        batch_size=in_range("--batch-size", batch_size, 1, 4096),
        checkpoint_every=in_range("--checkpoint-every", checkpoint_every, 0, 1_000_000),
        preview=in_range("--preview", preview, 0, 1_000_000),
        vram=budget("--vram", vram),
        stage_budget=budget("--stage-budget", stage_budget),
        steps_down=0,
    )


def _sizes(
    model: Model, size: Size | tuple[int, int] | None, binning: bool, begun: SavedLatents | None
) -> tuple[Size, Size]:
    """What is asked for, and what is computed for it.

    Args:
        begun: what is started from, which gives the size where `size` does not.
    """
    configs = {role: model.config(role) for role in ("transformer", "vae", "scheduler")}
    family = model.get_family()
    asked = size if size is None or isinstance(size, Size) else Size(*size)
    try:
        if begun is not None and asked is None:
            requested, rendered = begun.requested, begun.rendered
            family.render_size(configs, rendered, False)  # whether it can do that
        else:
            requested, rendered = family.render_size(configs, asked, binning)
        note = family.size_note(model.name, configs, requested, rendered)
    except (KeyError, TypeError) as error:
        raise ModelError(f"{model.name} has a configuration that lacks {error}") from None
    if note:
        log.warning("%s", note)
    return requested, rendered


def _aesthetic_scores(given: Sequence[float] | None, family: Family) -> tuple[float, ...]:
    if given is None:
        return family.aesthetic_scores
    if not family.aesthetic_scores:
        raise RequestError(f"--aesthetic has no meaning for {family.name}: leave it out")
    if len(given) != 2 or not all(0 <= score <= 10 for score in given):
        raise RequestError(
            f"--aesthetic {list(given)} is not two numbers from 0 to 10: for example 6,2.5"
        )
    return tuple(float(score) for score in given)
