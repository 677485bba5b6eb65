"""The command that makes pictures of prompts, or of a list with rows of their own."""

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

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
    Guidance,
    Image,
    Images,
    InProcess,
    Karras,
    Latents,
    MaxTokens,
    ModelName,
    Negative,
    Padding,
    PictureSize,
    Preview,
    PromptsFile,
    PromptsOrNone,
    Refine,
    Refiner,
    Revision,
    SampleSeed,
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
    StrengthOfRefiner,
    TextEncoder,
    Timesteps,
    Towards,
    Transformer,
    Vae,
    Vram,
    Weighting,
)
from lowvram.cli.output import print_run, showing_progress
from lowvram.cli.words import option_name, to_options
from lowvram.errors import RequestError
from lowvram.repository import DEFAULT_MODEL
from lowvram.request.denoise import TRANSFORMER_WEIGHTS
from lowvram.request.encode import WEIGHTS
from lowvram.request.refine import DEFAULT_REFINER

# What `run` takes beside its options: what it makes, of which model, and how it is told.
_BESIDE = (
    "prompts",
    "prompts_file",
    "model",
    "output",
    "revision",
    "transformer",
    "vae",
    "text_encoder",
    "in_process",
    "as_json",
)


def run(
    prompts: PromptsOrNone = None,
    prompts_file: PromptsFile = None,
    model: ModelName = DEFAULT_MODEL,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="x.png or a folder; default: a new file in outputs/"),
    ] = None,
    negative: Negative = "",
    encoder_weights: Annotated[
        str,
        typer.Option(
            "--encoder-weights", help=f"How the text encoder's weights sit: {', '.join(WEIGHTS)}."
        ),
    ] = "auto",
    transformer_weights: Annotated[
        str,
        typer.Option(
            "--transformer-weights",
            help=f"How the transformer's weights sit: {', '.join(TRANSFORMER_WEIGHTS)}.",
        ),
    ] = "auto",
    pixels: Decode = "auto",
    vram: Vram = None,
    stage_budget: StageBudget = None,
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
    image: Image = None,
    sample_seed: SampleSeed = None,
    start: Start = None,
    start_picture: StartPicture = None,
    strength: Strength = None,
    towards: Towards = None,
    at: At = None,
    checkpoint_every: CheckpointEvery = 0,
    preview: Preview = 0,
    clean: CleanCaption = None,
    padding: Padding = None,
    max_tokens: MaxTokens = None,
    weighting: Weighting = False,
    cache: Cache = True,
    embeds: Embeds = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    batch_size: BatchSize = 1,
    revision: Revision = None,
    transformer: Transformer = None,
    vae: Vae = None,
    text_encoder: TextEncoder = None,
    refine: Refine = False,
    refine_strength: StrengthOfRefiner = None,
    refiner: Refiner = DEFAULT_REFINER,
    in_process: InProcess = False,
    as_json: AsJson = False,
) -> None:
    """Prompts to pictures: encode, denoise and decode in order, each in a process of its own.

    \b
    lowvram run "a large blue star on a yellow background" -m demo -o star.png
    lowvram run --prompts prompts.csv -m demo -o pictures/
    lowvram run "an oil painting of a harbour" --image photo.jpg --strength 0.6 -o harbour.png
    """
    given = locals()
    from lowvram.run import run as run_stages

    if prompts_file is not None:
        return _run_list(given)
    if not prompts:
        raise RequestError("say what the picture shall show, or name a list of it with --prompts")
    options = for_run(given)
    with showing_progress(loads_here=in_process) as on_progress:
        result = run_stages(
            prompts,
            model,
            output,
            revision=revision,
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            in_process=in_process,
            on_progress=on_progress,
            **options,
        )
    print_run(result, as_json)


def for_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """The command line's words as the keyword arguments of `run.resolve_run`."""
    return to_options(given, _BESIDE)


def of_the_list() -> tuple[str, ...]:
    """The parameters that are one for a list as a whole: no row may set them."""
    from lowvram.rows import REFINING, SHARED

    options = SHARED + REFINING
    names = inspect.signature(run).parameters
    return tuple(name for name in names if name in _BESIDE or option_name(name) in options)


def _run_list(given: dict[str, Any]) -> None:
    """`run --prompts`: one picture or more for each row."""
    from lowvram.batch import run_listed
    from lowvram.cli.rows import fields_of, read_lines, to_listed
    from lowvram.rows import REFINING, SHARED

    if given["prompts"]:
        raise RequestError("PROMPT and --prompts exclude each other: put all into the list")
    name = given["prompts_file"]
    known = fields_of(run, of_the_list())
    listed = [to_listed(line, known, given, for_run) for line in read_lines(name, known)]
    shared = {k: v for k, v in for_run(given).items() if k in SHARED + REFINING}
    with showing_progress(loads_here=given["in_process"]) as on_progress:
        result = run_listed(
            listed,
            given["model"],
            given["output"],
            "batch" if name == "-" else Path(name).stem,
            revision=given["revision"],
            transformer=given["transformer"],
            vae=given["vae"],
            text_encoder=given["text_encoder"],
            in_process=given["in_process"],
            on_progress=on_progress,
            **shared,
        )
    print_run(result, given["as_json"])
    if not given["as_json"]:
        for row in result.failed:
            print(f"failed: {row}", file=sys.stderr)
    result.raise_failed()
