"""The commands that begin with what is there already: a picture."""

from pathlib import Path
from typing import Annotated

import typer

from lowvram.cli.options import (
    AsJson,
    Binning,
    Device,
    Dtype,
    ModelName,
    PictureSize,
    Revision,
    StageBudget,
    Vram,
    parse_size,
)
from lowvram.cli.output import print_stage, showing_progress
from lowvram.memory.budget import parse_bytes
from lowvram.repository import DEFAULT_MODEL
from lowvram.request.encode_image import ENCODES


def encode_image(
    images: Annotated[
        list[Path], typer.Argument(metavar="PICTURE…", help="PNG, JPEG, WebP, TIFF, …")
    ],
    model: ModelName = DEFAULT_MODEL,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="x.latents.safetensors")
    ] = None,
    size: PictureSize = None,
    binning: Binning = True,
    sample_seed: Annotated[
        int | None,
        typer.Option(
            "--sample-seed",
            help="Draw from the VAE's posterior with this seed; default: take its mode.",
        ),
    ] = None,
    encode: Annotated[
        str, typer.Option("--encode", help=f"How the VAE encodes: {', '.join(ENCODES)}.")
    ] = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    vram: Vram = None,
    stage_budget: StageBudget = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Pictures to latents to start from (denoise --start), with the VAE alone on the device.

    \b
    lowvram encode-image photo.jpg -m pixart-sigma-1024 -o photo.latents.safetensors

    Without --size the picture gets the model's own size with its aspect ratio. What does not have
    the model's aspect ratio is cut at its edges, and never distorted.
    """
    from lowvram import api

    output = output or images[0].with_suffix(".latents.safetensors")
    with showing_progress() as on_progress:
        result = api.encode_image(
            images,
            model,
            output=output,
            size=parse_size(size),
            binning=binning,
            sample_seed=sample_seed,
            encode=encode,
            dtype=dtype,
            device=device,
            vram=parse_bytes("--vram", vram),
            stage_budget=parse_bytes("--stage-budget", stage_budget),
            revision=revision,
            on_progress=on_progress,
        )
    files = {"path": None, "embeds": None, "latents": str(output)}
    print_stage(result, as_json, [files for _ in result.items])
