"""The commands that make pictures: each stage alone, `run` for all three, and `plan` before it."""

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import gettempdir
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
    FileModel,
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
    Prompts,
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
    TransformerWeights,
    Vae,
    Vram,
    Weighting,
    Weights,
    parse_numbers,
    parse_seeds,
    parse_sigma_spacing,
    parse_size,
)
from lowvram.cli.output import beside, print_json, print_stage, showing_progress
from lowvram.errors import RequestError
from lowvram.memory.budget import parse_bytes
from lowvram.repository import DEFAULT_MODEL
from lowvram.request.denoise import TRANSFORMER_WEIGHTS
from lowvram.request.encode import WEIGHTS
from lowvram.request.refine import DEFAULT_REFINER

_AS_THEY_ARE = (
    "encoder_weights",
    "transformer_weights",
    "padding",
    "max_tokens",
    "weighting",
    "cache",
    "embeds",
    "steps",
    "binning",
    "eta",
    "scheduler",
    "spacing",
    "latents",
    "image",
    "sample_seed",
    "start",
    "start_picture",
    "strength",
    "towards",
    "checkpoint_every",
    "preview",
    "refine",
    "refine_strength",
    "refiner",
    "dtype",
    "device",
    "batch_size",
)


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
    from lowvram import api
    from lowvram.run import new_path

    with showing_progress() as on_progress:
        result = api.encode(
            prompts,
            model,
            output=output or new_path(prompts, ".embeds.safetensors"),
            negative_prompt=negative,
            weights=weights,
            dtype=dtype,
            device=device,
            clean_caption=clean,
            padding=padding,
            max_tokens=max_tokens,
            weighting=weighting,
            cache=cache,
            embeds=embeds,
            vram=parse_bytes("--vram", vram),
            stage_budget=parse_bytes("--stage-budget", stage_budget),
            revision=revision,
            text_encoder=text_encoder,
            step_down=True,
            on_progress=on_progress,
        )
    print_stage(result, as_json, [])


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
    from lowvram import api

    output = output or beside(embeds, ".latents.safetensors")
    with showing_progress() as on_progress:
        result = api.denoise(
            embeds,
            output=output,
            model=model,
            transformer=transformer,
            vae=vae,
            seed=parse_seeds(seed),
            images_per_prompt=images,
            steps=steps,
            timesteps=parse_numbers("--timesteps", timesteps, int),
            sigmas=parse_numbers("--sigmas", sigmas, float),
            guidance_scale=guidance,
            size=parse_size(size),
            binning=binning,
            eta=eta,
            scheduler=scheduler,
            spacing=spacing,
            sigma_spacing=parse_sigma_spacing(sigma_spacing, karras),
            latents=latents,
            start=start,
            start_picture=start_picture,
            strength=strength,
            towards=towards,
            at=parse_numbers("--at", at, float),
            checkpoint_every=checkpoint_every,
            preview=preview,
            weights=weights,
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            vram=parse_bytes("--vram", vram),
            stage_budget=parse_bytes("--stage-budget", stage_budget),
            step_down=True,
            on_progress=on_progress,
        )
    files = {"path": None, "embeds": str(embeds), "latents": str(output)}
    print_stage(result, as_json, [files for _ in result.items])


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
    from lowvram import api

    with showing_progress() as on_progress:
        result = api.decode(
            latents,
            output=output or beside(latents, ".png"),
            model=model,
            vae=vae,
            decode=pixels,
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            vram=parse_bytes("--vram", vram),
            stage_budget=parse_bytes("--stage-budget", stage_budget),
            step_down=True,
            on_progress=on_progress,
        )
    files = {"embeds": None, "latents": str(latents)}
    print_stage(result, as_json, [{"path": str(path), **files} for path in result.paths])


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
    from lowvram.run import run as run_stages

    if prompts_file is not None:
        return _run_list(locals())
    if not prompts:
        raise RequestError("say what the picture shall show, or name a list of it with --prompts")
    arguments = for_run(locals())
    with showing_progress(loads_here=in_process) as on_progress:
        result = run_stages(
            prompts,
            model,
            output,
            **arguments,
            revision=revision,
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            in_process=in_process,
            on_progress=on_progress,
        )
    if as_json:
        print_json(result.to_json())
    else:
        for made in result.images:
            print(made.path)
        print(f"\n{result.table()}")


# What says how a list as a whole is carried out: no row may set it.
_OF_THE_LIST = (
    "model",
    "output",
    "encoder_weights",
    "transformer_weights",
    "pixels",
    "vram",
    "stage_budget",
    "dtype",
    "device",
    "batch_size",
    "cache",
    "revision",
    "transformer",
    "vae",
    "text_encoder",
    "refine",
    "refine_strength",
    "refiner",
    "in_process",
    "as_json",
    "prompts_file",
)


def _run_list(given: dict[str, Any]) -> None:
    """`run --prompts`: one picture or more for each row."""
    from lowvram.batch import REFINING, SHARED, run_listed
    from lowvram.cli.rows import fields_of, read_lines, to_listed

    if given["prompts"]:
        raise RequestError("PROMPT and --prompts exclude each other: put all into the list")
    name = given["prompts_file"]
    known = fields_of(run, _OF_THE_LIST)
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
    if given["as_json"]:
        print_json(result.to_json())
    else:
        for image in result.images:
            print(image.path)
        print(f"\n{result.table()}")
        for row in result.failed:
            print(f"failed: {row}", file=sys.stderr)
    result.raise_failed()


def plan(every: bool, as_json: bool, device: str, **arguments: Any) -> None:
    """What each stage of a run would hold, read and take, before anything is downloaded or loaded.

    \b
    lowvram plan "a cactus with a happy face" --vram 4GiB
    lowvram plan "a cactus with a happy face" --size 2048x2048 -m pixart-sigma-2k --vram 2GiB --all

    From the configuration files alone. Takes the arguments of run; with --vram for a CUDA card of
    that budget, whether there is one here or not, unless --device says otherwise.
    """
    from lowvram.cli.plans import as_document, as_table
    from lowvram.request.run import resolve_image, resolve_run
    from lowvram.swaps import resolve_with
    from lowvram.terminal import quiet_environment

    quiet_environment()
    named = (arguments.pop("model"), arguments.pop("revision"))
    others = {role: arguments.pop(role) for role in ("transformer", "vae", "text_encoder")}
    model = resolve_with(*named, **others)
    prompts = arguments.pop("prompts")
    if not prompts:
        raise RequestError("say what the picture shall show")
    nowhere = Path(gettempdir(), "x.png")  # nothing is written, and this can be everywhere
    options: Any = for_run({**arguments, "device": device})
    tasks = resolve_run(prompts, model, nowhere, **options)
    image = resolve_image(model, nowhere, options)
    from lowvram.stages import plan as planning  # imports torch

    if tasks[1].asks_the_scheduler:
        from lowvram.stages.denoise import check_each

        refused: list[Any] = []  # here as it would be in the run
        check_each([tasks[1]], lambda _, outcome: refused.append(outcome))
        if refused:
            raise refused[0]
    there = planning.device_to_plan_for(device, tasks[0].vram)
    rows = planning.plan(*tasks, there, every, image)
    if arguments["refine"]:
        from lowvram.request.refine import refining_of_run

        after = refining_of_run(tasks, nowhere, arguments["refine_strength"], arguments["refiner"])
        rows += planning.plan_refining(after, there, every)
    if as_json:
        print_json(as_document(rows, str(there)))
    else:
        print(as_table(rows, str(there)))


_NOT_OF_PLAN = ("output", "in_process", "as_json", "prompts_file")


def _signature_of_plan() -> inspect.Signature:
    """The arguments of `run`, without those about its output, and two of its own."""
    shared = inspect.signature(run).parameters
    own = {
        "every": Annotated[bool, typer.Option("--all", help="Every way, also what does not fit.")],
        "as_json": AsJson,
    }
    kept = [p for name, p in shared.items() if name not in _NOT_OF_PLAN]
    kept += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in own.items()
    ]
    return inspect.Signature(kept)


plan.__signature__ = _signature_of_plan()  # type: ignore[attr-defined]
plan.__annotations__ = {p.name: p.annotation for p in _signature_of_plan().parameters.values()}


def for_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """The command line's words as the keyword arguments of `run.resolve_run`."""
    return {
        "negative_prompt": given["negative"],
        "decode": given["pixels"],
        "vram": parse_bytes("--vram", given["vram"]),
        "stage_budget": parse_bytes("--stage-budget", given["stage_budget"]),
        "clean_caption": given["clean"],
        "seed": parse_seeds(given["seed"]),
        "images_per_prompt": given["images"],
        "timesteps": parse_numbers("--timesteps", given["timesteps"], int),
        "sigmas": parse_numbers("--sigmas", given["sigmas"], float),
        "guidance_scale": given["guidance"],
        "at": parse_numbers("--at", given["at"], float),
        "size": parse_size(given["size"]),
        "sigma_spacing": parse_sigma_spacing(given["sigma_spacing"], given["karras"]),
        **{name: given[name] for name in _AS_THEY_ARE},
    }
