"""The three stages as commands, each alone."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from lowvram.cli.options import (
    AsJson,
    At,
    BatchSize,
    Binning,
    Cache,
    CheckpointEvery,
    CleanCaption,
    Decode,
    Device,
    Dtype,
    Embeds,
    Eta,
    FileModel,
    Guidance,
    Images,
    Karras,
    Latents,
    MaxTokens,
    ModelName,
    Negative,
    Padding,
    PictureSize,
    Preview,
    Prompts,
    Revision,
    Scheduler,
    Seed,
    Sigmas,
    SigmaSpacing,
    Spacing,
    StageBudget,
    Start,
    StartPicture,
    Steps,
    Strength,
    TextEncoder,
    Timesteps,
    Towards,
    Transformer,
    TransformerWeights,
    Vae,
    Vram,
    Weighting,
    Weights,
)
from lowvram.cli.output import beside, images_of, print_stage, showing_progress
from lowvram.cli.words import to_options
from lowvram.repository import DEFAULT_MODEL


def encode(
    prompts: Prompts,
    model: ModelName = DEFAULT_MODEL,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="x.embeds.safetensors")
    ] = None,
    negative: Negative = "",
    weights: Weights = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    clean: CleanCaption = None,
    padding: Padding = None,
    max_tokens: MaxTokens = None,
    weighting: Weighting = False,
    cache: Cache = True,
    embeds: Embeds = None,
    vram: Vram = None,
    stage_budget: StageBudget = None,
    revision: Revision = None,
    text_encoder: TextEncoder = None,
    as_json: AsJson = False,
) -> None:
    """Prompts to embeddings, with the text encoder alone on the device.

    \b
    lowvram encode "a cactus with a happy face" -m pixart-sigma-1024 -o cactus.embeds.safetensors
    """
    options = to_options(locals(), but=("prompts", "model", "output", "as_json"))
    from lowvram import api
    from lowvram.names import new_path

    named = nullcontext(output) if output else new_path(prompts, ".embeds.safetensors")
    with named as path, showing_progress() as on_progress:
        result = api.encode(
            prompts, model, output=path, step_down=True, on_progress=on_progress, **options
        )
    texts = [{name: item[name] for name in ("prompt", "negative_prompt")} for item in result.items]
    print_stage(result, as_json, {"embeds": str(path), "texts": texts, "images": []})


def denoise(
    embeds: Annotated[Path, typer.Argument(help="What encode wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="x.latents.safetensors")
    ] = None,
    model: FileModel = None,
    transformer: Transformer = None,
    vae: Vae = None,
    seed: Seed = "0",
    images: Images = None,
    steps: Steps = None,
    timesteps: Timesteps = None,
    sigmas: Sigmas = None,
    guidance: Guidance = None,
    size: PictureSize = None,
    binning: Binning = True,
    eta: Eta = 0.0,
    scheduler: Scheduler = "",
    spacing: Spacing = "",
    sigma_spacing: SigmaSpacing = "",
    karras: Karras = None,
    latents: Latents = None,
    start: Start = None,
    start_picture: StartPicture = None,
    strength: Strength = None,
    towards: Towards = None,
    at: At = None,
    checkpoint_every: CheckpointEvery = 0,
    preview: Preview = 0,
    weights: TransformerWeights = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    batch_size: BatchSize = 1,
    vram: Vram = None,
    stage_budget: StageBudget = None,
    as_json: AsJson = False,
) -> None:
    """Embeddings to latents, with the transformer alone on the device.

    \b
    lowvram denoise cactus.embeds.safetensors --seed 7 --size 1024x768
    """
    options = to_options(locals(), but=("embeds", "output", "as_json"))
    from lowvram import api

    output = output or beside(embeds, ".latents.safetensors")
    with showing_progress() as on_progress:
        result = api.denoise(
            embeds, output=output, step_down=True, on_progress=on_progress, **options
        )
    files = {"path": None, "embeds": str(embeds), "latents": str(output)}
    shown = images_of(result, [files for _ in result.items])
    print_stage(result, as_json, {"latents": str(output), "images": shown})


def decode(
    latents: Annotated[Path, typer.Argument(help="What denoise wrote.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="x.png")] = None,
    model: FileModel = None,
    vae: Vae = None,
    pixels: Decode = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    batch_size: BatchSize = 1,
    vram: Vram = None,
    stage_budget: StageBudget = None,
    as_json: AsJson = False,
) -> None:
    """Latents to pictures, with the VAE alone on the device.

    \b
    lowvram decode cactus.latents.safetensors -o cactus.png
    """
    options = to_options(locals(), but=("latents", "output", "as_json"))
    from lowvram import api

    with showing_progress() as on_progress:
        result = api.decode(
            latents,
            output=output or beside(latents, ".png"),
            step_down=True,
            on_progress=on_progress,
            **options,
        )
    files = {"embeds": None, "latents": str(latents)}
    shown = images_of(result, [{"path": str(path), **files} for path in result.paths])
    print_stage(result, as_json, {"images": shown})
