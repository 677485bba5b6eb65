"""What was asked of a refiner: a model that works on pictures that are there already.

It is the same four stages as any picture's that starts from another; only their defaults differ.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from lowvram import artifacts
from lowvram.errors import RequestError
from lowvram.families.family import Size
from lowvram.repository import Model, resolve
from lowvram.request.decode import picture_paths, resolve_decode
from lowvram.request.denoise import resolve_denoise
from lowvram.request.encode import resolve_encode
from lowvram.request.encode_image import resolve_encode_image
from lowvram.request.negatives import check_negatives
from lowvram.request.start import SavedLatents
from lowvram.request.tasks import Tasks

DEFAULT_REFINER = "sdxl-refiner"
START_SUFFIX = ".start.latents.safetensors"


class RefineOptions(TypedDict, total=False):
    """What may be asked for; see `resolve_refine`."""

    negative_prompt: str | Sequence[str]
    seed: int | Sequence[int]
    strength: float | None
    steps: int | None
    guidance_scale: float | None
    aesthetic_scores: Sequence[float] | None
    encoder_weights: str
    transformer_weights: str
    encode: str
    decode: str
    dtype: str
    device: str
    batch_size: int
    vram: int | None
    stage_budget: int | None


def resolve_refine(
    pictures: str | Path | Sequence[str | Path],
    prompts: str | Sequence[str],
    model: Model,
    output: Path,
    *,
    size: Size | None = None,
    negative_prompt: str | Sequence[str] = "",
    seed: int | Sequence[int] = 0,
    strength: float | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    aesthetic_scores: Sequence[float] | None = None,
    encoder_weights: str = "auto",
    transformer_weights: str = "auto",
    encode: str = "auto",
    decode: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    batch_size: int = 1,
    vram: int | None = None,
    stage_budget: int | None = None,
) -> Tasks:
    """Check what was asked, for all four stages.

    Args:
        pictures: files, all of one size.
        prompts: what they show: one for all, or one for each.
        output: x.png; for several pictures x-0.png, …. The files in between lie beside it.
        size: of pictures that are not there yet; None to read it from them.
        seed: of the first picture, the next ones count up; or one for each.
        strength: how much of the steps is done, more than 0 to 1; None for the model's default.
        encode: how the VAE encodes, as `decode` how it decodes.

    Raises:
        RequestError: names the value and the way out.
    """
    family = model.get_family()
    if not family.needs_start:
        raise RequestError(f"{model.name} is no refiner: use -m {DEFAULT_REFINER}")
    paths = [Path(pictures)] if isinstance(pictures, str | Path) else [Path(p) for p in pictures]
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    texts = texts * len(paths) if len(texts) == 1 else texts
    if len(texts) != len(paths):
        raise RequestError(f"{len(texts)} prompts for {len(paths)} pictures: give one, or as many")
    seeds = [seed + i for i in range(len(paths))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(paths):
        raise RequestError(f"{len(seeds)} seeds for {len(paths)} pictures: give one, or as many")
    stem = output.with_suffix("")
    embeds, latents = (Path(f"{stem}{each}") for each in artifacts.SUFFIXES.values())
    start = Path(f"{stem}{START_SUFFIX}")
    shared: dict[str, Any] = {"device": device, "vram": vram, "stage_budget": stage_budget}
    # The VAE that overflows in fp16 upcasts itself, and goes its own way.
    vae_dtype = "auto" if dtype == "fp16" and model.vae_upcasts else dtype
    image = resolve_encode_image(
        paths, model, start, size=size or _size_of(paths), sample_seed=seeds, encode=encode,
        dtype=vae_dtype, there=size is None, **shared,
    )  # fmt: skip
    begun = SavedLatents(str(start), Size(*image.requested), Size(*image.rendered), len(paths))
    asked = resolve_encode(
        texts, model, embeds, negative_prompt=negative_prompt, weights=encoder_weights,
        dtype=dtype, **shared,
    )  # fmt: skip
    denoise = resolve_denoise(
        embeds, model, latents, prompts=len(texts), seed=seeds, images_per_prompt=1,
        start=begun, strength=strength, steps=steps, guidance_scale=guidance_scale,
        aesthetic_scores=aesthetic_scores, weights=transformer_weights, dtype=dtype,
        batch_size=batch_size, **shared,
    )  # fmt: skip
    check_negatives(asked, denoise)
    return Tasks(
        asked,
        denoise,
        resolve_decode(
            latents, model, output, decode=decode, dtype=vae_dtype, batch_size=batch_size, **shared
        ),
        image,
    )


def refining_of_run(tasks: Tasks, output: Path, strength: float | None, refiner: str) -> Tasks:
    """The refiner's stages after a run: its pictures, its prompts and seeds, its budget.

    Args:
        output: x.png, for the refined ones.
    """
    encode, denoise, decode = tasks.encode, tasks.denoise, tasks.decode
    images, model = denoise.images_per_prompt, resolve(refiner)
    if strength is not None and model.get_family().needs_start:
        least = -(-1000 // model.steps) / 1000
        if not least <= strength <= 1:  # NaN fails this too
            raise RequestError(f"--refine-strength {strength:g} is out of range: {least:g} to 1")

    def each(texts: Sequence[str]) -> list[str]:
        return [text for text in texts for _ in range(images)]

    return resolve_refine(
        picture_paths(Path(decode.output), len(denoise.seeds)),
        each(encode.prompts),
        model,
        output,
        size=Size(*denoise.requested),
        negative_prompt=each(encode.negative_prompts),
        seed=denoise.seeds,
        strength=strength,
        decode="strips" if decode.decode == "strips" else "auto",
        encode="strips" if decode.decode == "strips" else "auto",
        dtype=denoise.dtype,
        device=denoise.device,
        batch_size=denoise.batch_size,
        vram=denoise.vram or None,
        stage_budget=denoise.stage_budget or None,
    )


def unrefined(output: Path) -> Path:
    """Where a run puts its pictures when a refiner follows: x-unrefined.png for x.png."""
    return output.with_stem(f"{output.stem}-unrefined")


def _size_of(paths: Sequence[Path]) -> Size:
    from lowvram.pixels.picture import read_size

    sizes = {Size(*read_size(path)) for path in paths}
    if len(sizes) != 1:
        shown = ", ".join(str(each) for each in sorted(sizes, key=str))
        raise RequestError(f"the pictures have different sizes ({shown}): refine each size alone")
    return sizes.pop()
