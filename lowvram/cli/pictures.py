"""The commands that begin with what is there already: a picture, or two texts."""

from pathlib import Path
from typing import Annotated

import typer

from lowvram.artifacts import SUFFIXES
from lowvram.cli.options import (
    AsJson,
    At,
    Binning,
    Device,
    Dtype,
    ModelName,
    PictureSize,
    Revision,
    SampleSeed,
    StageBudget,
    Vae,
    Vram,
)
from lowvram.cli.output import images_of, print_json, print_stage, showing_progress
from lowvram.cli.words import parse_numbers, to_options
from lowvram.repository import DEFAULT_MODEL
from lowvram.request.encode_image import ENCODES


def encode_image(
    images: Annotated[
        list[Path], typer.Argument(metavar="PICTURE…", help="PNG, JPEG, WebP, TIFF, …")
    ],
    model: ModelName = DEFAULT_MODEL,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Default: x.image.latents.safetensors beside the first picture."
        ),
    ] = None,
    vae: Vae = None,
    size: PictureSize = None,
    binning: Binning = True,
    sample_seed: SampleSeed = None,
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
    lowvram encode-image photo.jpg -m pixart-sigma-1024

    Without --size the picture gets the model's own size with its aspect ratio. What does not have
    the model's aspect ratio is cut at its edges, and never distorted.
    """
    options = to_options(locals(), but=("images", "model", "output", "as_json"))
    from lowvram import api

    # Not x.latents…: that is what a run that made x.png left beside it, and decode makes x.png of.
    output = output or images[0].with_suffix(f".image{SUFFIXES['latents']}")
    with showing_progress() as on_progress:
        result = api.encode_image(
            images, model, output=output, step_down=True, on_progress=on_progress, **options
        )
    files = {"path": None, "embeds": None, "latents": str(output)}
    shown = images_of(result, [files for _ in result.items])
    print_stage(result, as_json, {"latents": str(output), "images": shown})


def interpolate(
    one: Annotated[Path, typer.Argument(metavar="ONE", help="What encode wrote.")],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Of another prompt.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="x.embeds.safetensors")],
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Texts between two texts: embeddings to embeddings, for denoise. Loads no model.

    \b
    lowvram interpolate cat.embeds.safetensors dog.embeds.safetensors -o walk.embeds.safetensors
    lowvram denoise walk.embeds.safetensors --seed 7

    At 0 and 1 the texts themselves, bit for bit.
    """
    from lowvram import api

    header = api.interpolate(one, other, output=output, at=parse_numbers("--at", at, float))
    if as_json:
        print_json(
            {
                "path": str(output),
                "texts": [{k: item[k] for k in ("prompt", "at")} for item in header.items],
            }
        )
        return
    print(output)
    for item in header.items:
        print(f"{item['at']:g}  {item['prompt']}")
