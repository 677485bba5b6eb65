"""The command for the fourth stage: a picture that is there already becomes finer."""

from pathlib import Path
from typing import Annotated

import typer

from lowvram.cli.options import (
    Aesthetic,
    AsJson,
    BatchSize,
    Decode,
    Device,
    Dtype,
    Guidance,
    InProcess,
    Negative,
    RefineStrength,
    Revision,
    Seed,
    StageBudget,
    Steps,
    Vram,
)
from lowvram.cli.output import print_run, showing_progress
from lowvram.cli.words import to_options
from lowvram.request.denoise import TRANSFORMER_WEIGHTS
from lowvram.request.encode import WEIGHTS
from lowvram.request.encode_image import ENCODES
from lowvram.request.refine import DEFAULT_REFINER


def refine(
    picture: Annotated[Path, typer.Argument(help="PNG, JPEG, WebP, TIFF, …")],
    prompt: Annotated[str, typer.Argument(help="What it shows.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="A refiner: short name, repository or folder.")
    ] = DEFAULT_REFINER,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: x-refined.png beside x.png.")
    ] = None,
    negative: Negative = "",
    strength: RefineStrength = None,
    steps: Steps = None,
    guidance: Guidance = None,
    aesthetic: Aesthetic = None,
    seed: Seed = "0",
    encoder_weights: Annotated[
        str,
        typer.Option(
            "--encoder-weights", help=f"How the text encoder's weights sit: {', '.join(WEIGHTS)}."
        ),
    ] = "auto",
    unet_weights: Annotated[
        str,
        typer.Option(
            "--unet-weights", help=f"How the UNet's weights sit: {', '.join(TRANSFORMER_WEIGHTS)}."
        ),
    ] = "auto",
    encode: Annotated[
        str, typer.Option("--encode", help=f"How the VAE encodes: {', '.join(ENCODES)}.")
    ] = "auto",
    pixels: Decode = "auto",
    vram: Vram = None,
    stage_budget: StageBudget = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    batch_size: BatchSize = 1,
    revision: Revision = None,
    in_process: InProcess = False,
    as_json: AsJson = False,
) -> None:
    """Add fine detail to a picture, of any origin; it keeps its size.

    \b
    lowvram refine cactus.png "a cactus with a happy face" --vram 1GiB

    Text encoder, VAE, UNet and VAE again, each in a process of its own.
    """
    options = to_options(locals(), but=("picture", "prompt", "model", "output", "as_json"))
    from lowvram.refining import refine as refine_stages

    with showing_progress(loads_here=in_process) as on_progress:
        result = refine_stages(picture, prompt, model, output, on_progress=on_progress, **options)
    print_run(result, as_json)
