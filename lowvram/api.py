"""The three stages as Python functions, run in the calling process.

They take what the command line takes and return what it prints: the files made, a record for each
prompt or picture, and the report of memory and time. `run` (in run.py) does all three.
"""

from collections.abc import Sequence
from pathlib import Path

from lowvram import artifacts
from lowvram.families.family import Size
from lowvram.progress import OnProgress, ignore
from lowvram.repository import DEFAULT_MODEL, resolve
from lowvram.request import model_of, resolve_decode, resolve_denoise, resolve_encode
from lowvram.stages import decode as decode_stage
from lowvram.stages import denoise as denoise_stage
from lowvram.stages import encode as encode_stage
from lowvram.stages.denoise import Callback
from lowvram.stages.result import StageResult


def encode(
    prompts: str | Sequence[str],
    model: str = DEFAULT_MODEL,
    *,
    output: str | Path,
    negative_prompt: str | Sequence[str] = "",
    weights: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    clean_caption: bool = True,
    padding: str = "none",
    max_tokens: int | None = None,
    vram: int | None = None,
    stage_budget: int | None = None,
    revision: str | None = None,
    on_progress: OnProgress = ignore,
) -> StageResult:
    """Prompts to embeddings, with the text encoder alone. Arguments: `request.resolve_encode`.

    Raises:
        LowvramError: see errors.py.
    """
    task = resolve_encode(
        prompts,
        resolve(model, revision),
        output,
        negative_prompt=negative_prompt,
        weights=weights,
        dtype=dtype,
        device=device,
        clean_caption=clean_caption,
        padding=padding,
        max_tokens=max_tokens,
        vram=vram,
        stage_budget=stage_budget,
    )
    return encode_stage.encode(task, on_progress)


def denoise(
    embeds: str | Path,
    *,
    output: str | Path,
    model: str | None = None,
    seed: int | Sequence[int] = 0,
    images_per_prompt: int | None = None,
    steps: int | None = None,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    guidance_scale: float | None = None,
    size: Size | tuple[int, int] | None = None,
    binning: bool = True,
    eta: float = 0.0,
    latents: str | Path | None = None,
    weights: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    batch_size: int = 1,
    vram: int | None = None,
    stage_budget: int | None = None,
    callback: Callback | None = None,
    callback_steps: int = 1,
    on_progress: OnProgress = ignore,
) -> StageResult:
    """Embeddings to latents, with the transformer alone. Arguments: `request.resolve_denoise`.

    Args:
        model: None for the one that the embeddings were made for.
        callback: called with step, timestep and latents after every `callback_steps`th step.

    Raises:
        LowvramError: see errors.py.
    """
    header = artifacts.read_header(Path(embeds), "embeds")
    task = resolve_denoise(
        embeds,
        model_of(Path(embeds), header, model),
        output,
        prompts=len(header.items),
        seed=seed,
        images_per_prompt=images_per_prompt,
        steps=steps,
        timesteps=timesteps,
        sigmas=sigmas,
        guidance_scale=guidance_scale,
        size=size,
        binning=binning,
        eta=eta,
        latents=latents,
        weights=weights,
        dtype=dtype,
        device=device,
        batch_size=batch_size,
        vram=vram,
        stage_budget=stage_budget,
    )
    return denoise_stage.denoise(task, on_progress, callback, callback_steps)


def decode(
    latents: str | Path,
    *,
    output: str | Path,
    model: str | None = None,
    pixels: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    batch_size: int = 1,
    vram: int | None = None,
    stage_budget: int | None = None,
    on_progress: OnProgress = ignore,
) -> StageResult:
    """Latents to pictures, with the VAE alone. Arguments: `request.resolve_decode`.

    Args:
        model: None for the one that the latents were made for.
        pixels: how the VAE decodes, "auto", "whole", "strips" or "blended".

    Raises:
        LowvramError: see errors.py.
    """
    header = artifacts.read_header(Path(latents), "latents")
    task = resolve_decode(
        latents,
        model_of(Path(latents), header, model),
        output,
        decode=pixels,
        dtype=dtype,
        device=device,
        batch_size=batch_size,
        vram=vram,
        stage_budget=stage_budget,
    )
    return decode_stage.decode(task, on_progress)
