"""What was asked of the encode-image stage: a picture to start from, through the VAE."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from lowvram.errors import ModelError, RequestError
from lowvram.families.family import Size
from lowvram.repository import Model
from lowvram.request.checks import artifact, budget, in_range, one_of
from lowvram.request.encode import DTYPES
from lowvram.request.seeds import MAX_SEED

ENCODES = ("auto", "whole", "strips")


@dataclass(frozen=True)
class EncodeImageTask:
    """Everything the encode-image stage needs. See `resolve_encode_image`."""

    model: dict[str, Any]
    images: tuple[str, ...]
    output: str
    requested: tuple[int, int]  # width, height in px, of the picture that decode makes of it
    rendered: tuple[int, int]  # of what is encoded
    sample_seeds: tuple[int, ...]  # one per picture; empty for the mode of the posterior
    encode: str
    dtype: str
    device: str
    vram: int
    stage_budget: int
    steps_down: int


class EncodeImageOptions(TypedDict, total=False):
    """What may be asked for; see `resolve_encode_image`."""

    size: Size | tuple[int, int] | None
    binning: bool
    sample_seed: int | Sequence[int] | None
    encode: str
    dtype: str
    device: str
    vram: int | None
    stage_budget: int | None


def resolve_encode_image(
    images: str | Path | Sequence[str | Path],
    model: Model,
    output: str | Path,
    *,
    size: Size | tuple[int, int] | None = None,
    binning: bool = True,
    sample_seed: int | Sequence[int] | None = None,
    encode: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    vram: int | None = None,
    stage_budget: int | None = None,
    there: bool = True,
) -> EncodeImageTask:
    """Check what was asked of the encode-image stage.

    Args:
        images: one picture's file, or several, which get one size.
        output: path of the file of latents.
        size: width and height in px of the picture that decode makes of the latents; what is
            encoded is the size that the model computes for it. None for the model's own size with
            the aspect ratio of the (first) picture.
        binning: encode at the nearest size the model was trained on.
        sample_seed: draw from the posterior of the VAE with this seed (counting up for further
            pictures), or with one for each; None for its mode, which is always the same.
        encode: "whole" or "strips" (the same latents in less memory); "auto" takes whole where it
            fits, else strips.
        vram: bytes that the process may take on the device; None for what is free.
        stage_budget: bytes that tensors may take there, which counts instead; None for none.
        there: whether the pictures are there already. Others need a `size`.

    Raises:
        RequestError: names the value and the way out.
    """
    from lowvram.pixels.picture import read_size

    paths = [images] if isinstance(images, str | Path) else list(images)
    if not paths:
        raise RequestError("there is no picture to encode: name one")
    sizes = [Size(*read_size(Path(path))) for path in paths] if there else []
    if dtype == "fp16" and model.vae_upcasts:
        raise RequestError("this VAE overflows in fp16 (its force_upcast): use --dtype fp32")
    configs = {role: model.config(role) for role in ("transformer", "vae", "scheduler")}
    family = model.get_family()
    try:
        if size is None:
            requested = family.size_like(configs, sizes[0], binning)
            requested, rendered = family.render_size(configs, requested, False)
        else:
            asked = size if isinstance(size, Size) else Size(*size)
            requested, rendered = family.render_size(configs, asked, binning)
    except (KeyError, TypeError) as error:
        raise ModelError(f"{model.name} has a configuration that lacks {error}") from None
    seeds = _sample_seeds(sample_seed, len(paths))
    return EncodeImageTask(
        model=model.record(),
        images=tuple(str(path) for path in paths),
        output=artifact(output, *paths),
        requested=(requested.width, requested.height),
        rendered=(rendered.width, rendered.height),
        sample_seeds=seeds,
        encode=one_of("--encode", encode, ENCODES),
        dtype=one_of("--dtype", dtype, DTYPES),
        device=device,
        vram=budget("--vram", vram),
        stage_budget=budget("--stage-budget", stage_budget),
        steps_down=0,
    )


def _sample_seeds(given: int | Sequence[int] | None, pictures: int) -> tuple[int, ...]:
    if given is None:
        return ()
    seeds = tuple(range(given, given + pictures)) if isinstance(given, int) else tuple(given)
    if len(seeds) != pictures:
        raise RequestError(
            f"{len(seeds)} sample seeds for {pictures} pictures: give one, or as many"
        )
    for seed in seeds:
        in_range("--sample-seed", seed, 0, MAX_SEED)
    return seeds
