"""What was asked of a run: of all three stages at once."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from lowvram import artifacts
from lowvram.errors import RequestError
from lowvram.families.family import Size
from lowvram.repository import Model
from lowvram.request.decode import DecodeOptions, DecodeTask, resolve_decode
from lowvram.request.denoise import DenoiseOptions, DenoiseTask, resolve_denoise
from lowvram.request.encode import EncodeOptions, EncodeTask, resolve_encode

Tasks = tuple[EncodeTask, DenoiseTask, DecodeTask]

log = logging.getLogger(__name__)


class RunOptions(TypedDict, total=False):
    """What may be asked for; see `resolve_encode`, `resolve_denoise` and `resolve_decode`.

    Two of them go by another name here: `weights` of encode and of denoise.
    """

    encoder_weights: str
    transformer_weights: str
    # of encode
    negative_prompt: str | Sequence[str]
    clean_caption: bool
    padding: str
    max_tokens: int | None
    weighting: bool
    cache: bool
    # of denoise
    seed: int | Sequence[int]
    images_per_prompt: int | None
    steps: int | None
    timesteps: Sequence[int] | None
    sigmas: Sequence[float] | None
    guidance_scale: float | None
    size: Size | tuple[int, int] | None
    binning: bool
    eta: float
    latents: str | Path | None
    # of decode
    decode: str
    # of several
    dtype: str
    device: str
    batch_size: int
    vram: int | None
    stage_budget: int | None


def resolve_run(
    prompts: str | Sequence[str], model: Model, picture: Path, **options: Unpack[RunOptions]
) -> Tasks:
    """Check what was asked of the three stages.

    Args:
        picture: x.png; the files in between lie beside it.

    Raises:
        RequestError: names the value and the way out.
    """
    _check_names(options)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    embeds, latents = (Path(f"{picture.with_suffix('')}{s}") for s in artifacts.SUFFIXES.values())
    encode = _of(EncodeOptions, options, weights="encoder_weights")
    denoise = _of(DenoiseOptions, options, weights="transformer_weights")
    if encode.get("dtype") == model.get_family().component("text_encoder").overflows_in:
        log.info("the text encoder overflows in %s: it computes in its own dtype", encode["dtype"])
        encode["dtype"] = "auto"
    tasks = (
        resolve_encode(texts, model, embeds, **encode),
        resolve_denoise(embeds, model, latents, prompts=len(texts), **denoise),
        resolve_decode(latents, model, picture, **_of(DecodeOptions, options)),
    )
    _check_together(tasks)
    return tasks


def _check_together(tasks: Tasks) -> None:
    """What one stage is asked for and another makes void.

    Raises:
        RequestError: a negative prompt without guidance.
    """
    scale = tasks[1].guidance_scale
    if scale <= 1 and any(text.strip() for text in tasks[0].negative_prompts):
        raise RequestError(
            f"--negative has no effect with --guidance {scale:g}, which turns guidance off: "
            "leave it out, or use a guidance above 1"
        )


def _check_names(options: Mapping[str, Any]) -> None:
    unknown = set(options) - set(RunOptions.__annotations__)
    if unknown:
        raise TypeError(f"run() got an unexpected keyword argument {min(unknown)!r}")


def _of(kind: Any, options: Mapping[str, Any], **renamed: str) -> Any:
    """Of a run's options those of one stage."""
    names = {name: renamed.get(name, name) for name in kind.__annotations__}
    return {name: options[ours] for name, ours in names.items() if ours in options}
