"""The command line: arguments to one call to one result. Imports no torch.

Results go to stdout, everything else to stderr; errors are one line and a documented exit code.
"""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowvram import errors
from lowvram.artifacts import SUFFIXES
from lowvram.options import (
    AsJson,
    BatchSize,
    Binning,
    CleanCaption,
    Decode,
    Device,
    Dtype,
    Eta,
    FileModel,
    Guidance,
    Images,
    Latents,
    MaxTokens,
    ModelName,
    Negative,
    Padding,
    PictureSize,
    PreparedWeights,
    Prompts,
    Revision,
    Seed,
    Sigmas,
    StageBudget,
    Steps,
    Timesteps,
    TransformerWeights,
    Weights,
    parse_bytes,
    parse_numbers,
    parse_seeds,
    parse_size,
)
from lowvram.repository import DEFAULT_MODEL
from lowvram.request import TRANSFORMER_WEIGHTS, WEIGHTS

if TYPE_CHECKING:
    from lowvram.progress import OnProgress
    from lowvram.stages.result import StageResult

app = typer.Typer(
    name="lowvram",
    help="Pictures from diffusion transformers on small graphics cards, in three stages that run "
    "alone: encode, denoise, decode.",
    epilog='Try: lowvram run "a large blue star on a yellow background" -m demo',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
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
    clean: CleanCaption = True,
    padding: Padding = "none",
    max_tokens: MaxTokens = None,
    stage_budget: StageBudget = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Prompts to embeddings, with the text encoder alone on the device.

    \b
    lowvram encode "a cactus with a happy face" -m pixart-sigma-1024 -o cactus.embeds.safetensors
    """
    from lowvram import api
    from lowvram.run import new_path

    with _terminal() as on_progress:
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
            stage_budget=parse_bytes("--stage-budget", stage_budget),
            revision=revision,
            on_progress=on_progress,
        )
    _print_stage(result, as_json, [])


@app.command()
def denoise(
    embeds: Annotated[Path, typer.Argument(help="What encode wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="x.latents.safetensors")
    ] = None,
    model: FileModel = None,
    seed: Seed = "0",
    images: Images = None,
    steps: Steps = None,
    timesteps: Timesteps = None,
    sigmas: Sigmas = None,
    guidance: Guidance = None,
    size: PictureSize = None,
    binning: Binning = True,
    eta: Eta = 0.0,
    latents: Latents = None,
    weights: TransformerWeights = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    batch_size: BatchSize = 1,
    stage_budget: StageBudget = None,
    as_json: AsJson = False,
) -> None:
    """Embeddings to latents, with the transformer alone on the device.

    \b
    lowvram denoise cactus.embeds.safetensors --seed 7 --size 1024x768
    """
    from lowvram import api

    output = output or _beside(embeds, ".latents.safetensors")
    with _terminal() as on_progress:
        result = api.denoise(
            embeds,
            output=output,
            model=model,
            seed=parse_seeds(seed),
            images_per_prompt=images,
            steps=steps,
            timesteps=None if timesteps is None else parse_numbers("--timesteps", timesteps, int),
            sigmas=None if sigmas is None else parse_numbers("--sigmas", sigmas, float),
            guidance_scale=guidance,
            size=None if size is None else parse_size(size),
            binning=binning,
            eta=eta,
            latents=latents,
            weights=weights,
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            stage_budget=parse_bytes("--stage-budget", stage_budget),
            on_progress=on_progress,
        )
    files = {"path": None, "embeds": str(embeds), "latents": str(output)}
    _print_stage(result, as_json, [files for _ in result.items])


@app.command()
def decode(
    latents: Annotated[Path, typer.Argument(help="What denoise wrote.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="x.png")] = None,
    model: FileModel = None,
    pixels: Decode = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    batch_size: BatchSize = 1,
    stage_budget: StageBudget = None,
    as_json: AsJson = False,
) -> None:
    """Latents to pictures, with the VAE alone on the device.

    \b
    lowvram decode cactus.latents.safetensors -o cactus.png
    """
    from lowvram import api

    with _terminal() as on_progress:
        result = api.decode(
            latents,
            output=output or _beside(latents, ".png"),
            model=model,
            pixels=pixels,
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            stage_budget=parse_bytes("--stage-budget", stage_budget),
            on_progress=on_progress,
        )
    files = {"embeds": None, "latents": str(latents)}
    _print_stage(result, as_json, [{"path": str(path), **files} for path in result.paths])


@app.command()
def run(
    prompts: Prompts,
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
    latents: Latents = None,
    clean: CleanCaption = True,
    padding: Padding = "none",
    max_tokens: MaxTokens = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    batch_size: BatchSize = 1,
    revision: Revision = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="All stages in one process, for debugging.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Prompts to pictures: encode, denoise and decode in order, each in a process of its own.

    \b
    lowvram run "a large blue star on a yellow background" -m demo -o star.png
    """
    from lowvram.run import run as run_stages

    with _terminal(loads_here=in_process) as on_progress:
        result = run_stages(
            prompts,
            model,
            output,
            negative_prompt=negative,
            encoder_weights=encoder_weights,
            transformer_weights=transformer_weights,
            decode=pixels,
            stage_budget=parse_bytes("--stage-budget", stage_budget),
            clean_caption=clean,
            padding=padding,
            max_tokens=max_tokens,
            seed=parse_seeds(seed),
            images_per_prompt=images,
            steps=steps,
            timesteps=None if timesteps is None else parse_numbers("--timesteps", timesteps, int),
            sigmas=None if sigmas is None else parse_numbers("--sigmas", sigmas, float),
            guidance_scale=guidance,
            size=None if size is None else parse_size(size),
            binning=binning,
            eta=eta,
            latents=latents,
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            revision=revision,
            in_process=in_process,
            on_progress=on_progress,
        )
    if as_json:
        _print_json(result.to_json())
    else:
        for image in result.images:
            print(image.path)
        print(f"\n{result.table()}")


@app.command()
def prepare(
    model: Annotated[
        str | None,
        typer.Argument(help="Short name (pixart-sigma-1024, demo, …), repository or folder."),
    ] = None,
    weights: PreparedWeights = "bf16",
    to: Annotated[
        Path | None, typer.Option("--to", help="Folder to put it in; default: the cache.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--list", help="Show what is prepared, with sizes.")
    ] = False,
    remove: Annotated[
        str | None,
        typer.Option("--remove", metavar="NAME", help="Delete: a name from the list, or a model."),
    ] = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Write once what every later run reads: half of what is published, or a quarter.

    \b
    lowvram prepare pixart-sigma-1024 --weights 8bit
    lowvram prepare --list
    """
    from lowvram import prepared

    if (model is not None) + show + (remove is not None) != 1:
        raise errors.RequestError("name a model to prepare, or use --list or --remove NAME")
    if remove is not None:
        freed = prepared.remove(remove)
        if as_json:
            _print_json({"freed_bytes": freed})
        else:
            print(f"freed {freed / 1e6:,.1f} MB")
        return
    entries = prepared.list_prepared()
    if model is not None:
        from lowvram.repository import resolve

        with _terminal() as on_progress:
            from lowvram.stages.prepare import prepare as write

            made = write(resolve(model, revision), weights, to, on_progress)
        entries = [each for each in prepared.list_prepared() if each.prepared in made]
    if as_json:
        _print_json({"prepared": [each.to_json() for each in entries]})
    for each in () if as_json else entries:
        print(f"{each.bytes / 1e6:10,.1f} MB  {each.state:<10}  {each.name}  {each.path}")


@app.command()
def report(
    file: Annotated[Path, typer.Argument(help="The x.report.json that run wrote.")],
    as_json: AsJson = False,
) -> None:
    """Memory and time of each stage of an earlier run.

    \b
    lowvram report outputs/a-red-heart.report.json
    """
    from lowvram.memory.report import read, table

    document = read(file)
    if as_json:
        _print_json(document)
    else:
        print(table(document["stages"]))


def main() -> None:
    """Entry point: errors become one line on stderr and an exit code."""
    for stream in (sys.stdout, sys.stderr):  # a path or prompt that this encoding lacks
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(exit_code(sys.argv[1:]))


def exit_code(arguments: Sequence[str]) -> int:
    """Carry out a command line and return its exit code (see errors.py)."""
    try:
        code = app(list(arguments), standalone_mode=False)
        if code == errors.INTERRUPTED_EXIT_CODE:  # what typer makes of Ctrl-C
            return _interrupted()
        return code if isinstance(code, int) else 0
    except errors.LowvramError as error:
        print(f"lowvram: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:  # the reader of our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())  # type: ignore[attr-defined]
            return 0
        if hasattr(error, "format_message"):  # click's: an unknown option, a missing argument
            print(f"lowvram: {error.format_message()} (see lowvram --help)", file=sys.stderr)
            return errors.RequestError.exit_code
        raise


def _interrupted() -> int:
    print("lowvram: interrupted", file=sys.stderr)
    return errors.INTERRUPTED_EXIT_CODE


def _terminal(loads_here: bool = True) -> "AbstractContextManager[OnProgress]":
    """Show progress; and where models are loaded in this process, keep the libraries quiet."""
    from lowvram.terminal import quiet_environment, quiet_libraries, terminal

    quiet_environment()
    if loads_here:
        quiet_libraries()
    return terminal()


def _beside(path: Path, suffix: str) -> Path:
    """x.embeds.safetensors to x.latents.safetensors or x.png."""
    known = next((each for each in SUFFIXES.values() if path.name.endswith(each)), path.suffix)
    return path.with_name(path.name.removesuffix(known) + suffix)


def _print_stage(result: "StageResult", as_json: bool, files: list[dict[str, Any]]) -> None:
    """A stage's result: the files it made and its row of the table, or the JSON document."""
    report = result.report.to_json()
    if as_json:
        shown = ("prompt", "seed", "width", "height")
        images = [
            {**{name: item[name] for name in shown}, **each}
            for item, each in zip(result.items, files, strict=False)
        ]
        _print_json({"images": images, "stages": [report]})
        return
    from lowvram.memory.report import table

    for path in result.paths:
        print(path)
    print(f"\n{table([report])}")


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2))
