"""What was asked of a run: of all its stages at once."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from lowvram import artifacts
from lowvram.errors import RequestError
from lowvram.families.family import Size
from lowvram.repository import Model
from lowvram.request.decode import DecodeOptions, resolve_decode
from lowvram.request.denoise import DenoiseOptions, resolve_denoise
from lowvram.request.encode import EncodeOptions, resolve_encode
from lowvram.request.encode_image import (
    ENCODES,
    EncodeImageOptions,
    EncodeImageTask,
    resolve_encode_image,
)
from lowvram.request.negatives import check_negatives
from lowvram.request.refine import DEFAULT_REFINER
from lowvram.request.start import SavedLatents
from lowvram.request.tasks import Tasks

log = logging.getLogger(__name__)


class RunOptions(TypedDict, total=False):
    """What may be asked for; see `resolve_encode`, `resolve_denoise` and `resolve_decode`.

    Two of them go by another name here: `weights` of encode and of denoise. For what stands before
    and after, see `resolve_encode_image` and `request.refine`.
    """

    encoder_weights: str
    transformer_weights: str
    # of encode
    negative_prompt: str | Sequence[str]
    clean_caption: bool | None
    padding: str | None
    max_tokens: int | None
    weighting: bool
    cache: bool
    embeds: str | Path | None
    # of denoise
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
    checkpoint_every: int
    preview: int
    # of encode-image, which comes first where there is an image; `decode` is of it, too
    image: str | Path | None
    sample_seed: int | Sequence[int] | None
    # of decode
    decode: str
    # of the refiner that follows, if one does
    refine: bool
    refine_strength: float | None
    refiner: str
    # of several
    dtype: str
    device: str
    batch_size: int
    vram: int | None
    stage_budget: int | None


def resolve_run(
    prompts: str | Sequence[str], model: Model, picture: Path, **options: Unpack[RunOptions]
) -> Tasks:
    """Check what was asked of the three stages, and of encode-image before them. Of a refiner after
    them: `request.refine`.

    Args:
        picture: x.png; the files in between lie beside it.

    Raises:
        RequestError: names the value and the way out.
    """
    _check_names(options)
    named = options.get("refiner", DEFAULT_REFINER) != DEFAULT_REFINER
    if not options.get("refine") and (named or options.get("refine_strength") is not None):
        raise RequestError("--refiner and --refine-strength need --refine: give it too")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    embeds, latents = (Path(f"{picture.with_suffix('')}{s}") for s in artifacts.SUFFIXES.values())
    encode = _of(EncodeOptions, options, weights="encoder_weights")
    denoise = _of(DenoiseOptions, options, weights="transformer_weights")
    if encode.get("dtype") == model.get_family().component("text_encoder").overflows_in:
        log.info("the text encoder overflows in %s: it computes in its own dtype", encode["dtype"])
        encode["dtype"] = "auto"
    image = _image(model, picture, options)
    if image is not None:
        sizes = Size(*image.requested), Size(*image.rendered)
        denoise |= {"size": None, "start": SavedLatents(image.output, *sizes, 1)}
    tasks = Tasks(
        resolve_encode(texts, model, embeds, **encode),
        resolve_denoise(embeds, model, latents, prompts=len(texts), **denoise),
        resolve_decode(latents, model, picture, **_of(DecodeOptions, options)),
        image,
    )
    check_negatives(tasks.encode, tasks.denoise)
    return tasks


def _image(model: Model, picture: Path, options: Mapping[str, Any]) -> EncodeImageTask | None:
    """Check what was asked of encode-image; None where a run has no image.

    Args:
        picture, options: as `resolve_run` takes them.

    Raises:
        RequestError: names the value and the way out.
    """
    image = options.get("image")
    if image is None:
        if options.get("sample_seed") is not None:
            raise RequestError("--sample-seed is about a picture: name it with --image")
        return None
    if options.get("start") is not None or options.get("start_picture") is not None:
        raise RequestError("--image and --start are both what to start from: give one of them")
    check_kept(image, picture)
    given = _of(EncodeImageOptions, options)
    decode = options.get("decode", "auto")
    given["encode"] = decode if decode in ENCODES else "auto"
    latents = f"{picture.with_suffix('')}.image{artifacts.SUFFIXES['latents']}"
    return resolve_encode_image(image, model, latents, **given)


def check_kept(image: str | Path, picture: Path) -> None:
    """Refuse to write over the picture that is started from.

    Args:
        picture: x.png, of which x-0.png, … may be made.

    Raises:
        RequestError: the image is one of these.
    """
    written = re.compile(rf"{re.escape(picture.stem)}(-\d+)?{re.escape(picture.suffix)}")
    if Path(image).resolve().parent == picture.resolve().parent and written.fullmatch(
        Path(image).name
    ):
        raise RequestError(f"{image} would be overwritten: name another picture with -o")


def _check_names(options: Mapping[str, Any]) -> None:
    unknown = set(options) - set(RunOptions.__annotations__)
    if unknown:
        raise TypeError(f"run() got an unexpected keyword argument {min(unknown)!r}")


def _of(kind: Any, options: Mapping[str, Any], **renamed: str) -> Any:
    """Of a run's options those of one stage."""
    names = {name: renamed.get(name, name) for name in kind.__annotations__}
    return {name: options[ours] for name, ours in names.items() if ours in options}
