"""The three stages as Python functions, run in the calling process.

They take what the command line takes and return what it prints: the files made, a record for each
prompt or picture, and the report of memory and time. `run` (in run.py) does all three.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from lowvram import artifacts
from lowvram.errors import ArtifactError
from lowvram.progress import OnProgress, ignore
from lowvram.repository import DEFAULT_MODEL, Model, resolve
from lowvram.request.decode import DecodeOptions, resolve_decode
from lowvram.request.denoise import DenoiseOptions, resolve_denoise
from lowvram.request.encode import EncodeOptions, resolve_encode
from lowvram.request.encode_image import EncodeImageOptions, resolve_encode_image
from lowvram.stages import decode as decode_stage
from lowvram.stages import denoise as denoise_stage
from lowvram.stages import encode as encode_stage
from lowvram.stages import encode_image as encode_image_stage
from lowvram.stages.interpolate import interpolate
from lowvram.stages.result import StageResult
from lowvram.stages.sampling import Callback

__all__ = ["decode", "denoise", "encode", "encode_image", "interpolate"]


def encode(
    prompts: str | Sequence[str],
    model: str = DEFAULT_MODEL,
    *,
    output: str | Path,
    revision: str | None = None,
    on_progress: OnProgress = ignore,
    **options: Unpack[EncodeOptions],
) -> StageResult:
    """Prompts to embeddings, with the text encoder alone.

    Args:
        output: x.embeds.safetensors.
        options: see `request.encode.resolve_encode`.

    Raises:
        LowvramError: see errors.py.
    """
    task = resolve_encode(prompts, resolve(model, revision), output, **options)
    return encode_stage.encode(task, on_progress)


def encode_image(
    images: str | Path | Sequence[str | Path],
    model: str = DEFAULT_MODEL,
    *,
    output: str | Path,
    revision: str | None = None,
    on_progress: OnProgress = ignore,
    **options: Unpack[EncodeImageOptions],
) -> StageResult:
    """Pictures to latents that `denoise` can start from, with the VAE alone.

    Args:
        output: x.latents.safetensors.
        options: see `request.encode_image.resolve_encode_image`.

    Raises:
        LowvramError: see errors.py.
    """
    task = resolve_encode_image(images, resolve(model, revision), output, **options)
    return encode_image_stage.encode_image(task, on_progress)


def denoise(
    embeds: str | Path,
    *,
    output: str | Path,
    model: str | None = None,
    callback: Callback | None = None,
    callback_steps: int = 1,
    on_progress: OnProgress = ignore,
    **options: Unpack[DenoiseOptions],
) -> StageResult:
    """Embeddings to latents, with the transformer alone.

    Args:
        output: x.latents.safetensors.
        model: None for the one that the embeddings were made for.
        callback: called with step, timestep and latents after every `callback_steps`th step.
        options: see `request.denoise.resolve_denoise`.

    Raises:
        LowvramError: see errors.py.
    """
    header = artifacts.read_header(Path(embeds), "embeds")
    made_for = _model_of(Path(embeds), header, model)
    task = resolve_denoise(embeds, made_for, output, prompts=len(header.items), **options)
    return denoise_stage.denoise(task, on_progress, callback, callback_steps)


def decode(
    latents: str | Path,
    *,
    output: str | Path,
    model: str | None = None,
    on_progress: OnProgress = ignore,
    **options: Unpack[DecodeOptions],
) -> StageResult:
    """Latents to pictures, with the VAE alone.

    Args:
        output: x.png.
        model: None for the one that the latents were made for.
        options: see `request.decode.resolve_decode`.

    Raises:
        LowvramError: see errors.py.
    """
    header = artifacts.read_header(Path(latents), "latents")
    task = resolve_decode(latents, _model_of(Path(latents), header, model), output, **options)
    return decode_stage.decode(task, on_progress)


def _model_of(path: Path, header: artifacts.Header, name: str | None) -> Model:
    """The model that a file was made for.

    Args:
        name: what the user named with -m; None to trust the file.

    Raises:
        ArtifactError: the user named another model than the file's.
    """
    made_for = Model.from_record(header.model)
    if name is None:
        return made_for
    model = resolve(name)
    if (model.name, model.family) != (made_for.name, made_for.family):
        raise ArtifactError(
            f"{path} was made for {made_for.name}, but --model is {name}: "
            "encode again, or drop --model"
        )
    # The commits that the file was made with; but a folder as it is now.
    on_hub = {role: source for role, source in made_for.sources.items() if source.kind == "hub"}
    return replace(model, sources={**model.sources, **on_hub})
