"""The stages as Python functions, run in the calling process.

They take what the command line takes and return what it prints: the files made, a record for each
prompt or picture, and the report of memory and time. `run` (in run.py) does encode, denoise and
decode in order; `refine` is in refining.py.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Unpack

from lowvram import artifacts
from lowvram.course import carry_one
from lowvram.errors import ArtifactError, MemoryExhaustedError, RequestError
from lowvram.memory.meter import StageReport
from lowvram.processes import StageProcesses
from lowvram.progress import OnProgress, ignore
from lowvram.repository import DEFAULT_MODEL, Model, resolve
from lowvram.request.decode import DecodeOptions, resolve_decode
from lowvram.request.denoise import DenoiseOptions, resolve_denoise
from lowvram.request.encode import EncodeOptions, resolve_encode
from lowvram.request.encode_image import EncodeImageOptions, resolve_encode_image
from lowvram.request.tasks import AnyTask
from lowvram.stages import decode as decode_stage
from lowvram.stages import denoise as denoise_stage
from lowvram.stages import encode as encode_stage
from lowvram.stages import encode_image as encode_image_stage
from lowvram.stages.interpolate import interpolate
from lowvram.stages.previews import OnPreview
from lowvram.stages.result import StageResult
from lowvram.stages.sampling import Callback
from lowvram.swaps import refreshed, resolve_with, swap

log = logging.getLogger(__name__)

__all__ = ["decode", "denoise", "encode", "encode_image", "interpolate"]


def encode(
    prompts: str | Sequence[str],
    model: str = DEFAULT_MODEL,
    *,
    output: str | Path,
    revision: str | None = None,
    text_encoder: str | Path | None = None,
    step_down: bool = False,
    on_progress: OnProgress = ignore,
    **options: Unpack[EncodeOptions],
) -> StageResult:
    """Prompts to embeddings, with the text encoder alone.

    Args:
        output: x.embeds.safetensors.
        text_encoder: another one than the model's: see `swaps.swap`.
        step_down: after an out-of-memory, go on in a fresh process with what takes less.
        options: see `request.encode.resolve_encode`.

    Raises:
        LowvramError: see errors.py.
    """
    found = resolve_with(model, revision, text_encoder=text_encoder)
    task = resolve_encode(prompts, found, output, **options)
    work = partial(encode_stage.encode, task, on_progress)
    return _stepping_down("encode", task, work, step_down, on_progress)


def encode_image(
    images: str | Path | Sequence[str | Path],
    model: str = DEFAULT_MODEL,
    *,
    output: str | Path,
    revision: str | None = None,
    vae: str | Path | None = None,
    step_down: bool = False,
    on_progress: OnProgress = ignore,
    **options: Unpack[EncodeImageOptions],
) -> StageResult:
    """Pictures to latents that `denoise` can start from, with the VAE alone.

    Args:
        output: x.latents.safetensors.
        vae: another one than the model's: see `swaps.swap`.
        step_down: after an out-of-memory, go on in a fresh process with what takes less.
        options: see `request.encode_image.resolve_encode_image`.

    Raises:
        LowvramError: see errors.py.
    """
    task = resolve_encode_image(images, resolve_with(model, revision, vae=vae), output, **options)
    work = partial(encode_image_stage.encode_image, task, on_progress)
    return _stepping_down(encode_image_stage.STAGE, task, work, step_down, on_progress)


def denoise(
    embeds: str | Path,
    *,
    output: str | Path,
    model: str | None = None,
    transformer: str | Path | None = None,
    vae: str | Path | None = None,
    callback: Callback | None = None,
    callback_steps: int = 1,
    on_preview: OnPreview | None = None,
    step_down: bool = False,
    on_progress: OnProgress = ignore,
    **options: Unpack[DenoiseOptions],
) -> StageResult:
    """Embeddings to latents, with the transformer alone.

    Args:
        output: x.latents.safetensors.
        model: None for the one that the embeddings were made for.
        transformer: another one than the model's: see `swaps.swap`.
        vae: likewise; the one of `start`, of previews, and of decode afterwards.
        callback: called with step, timestep and latents after every `callback_steps`th step.
        on_preview: called with step and levels `[pictures, height, width, 3]`, uint8, of each
            preview (`preview` says how often).
        step_down: after an out-of-memory, go on in a fresh process with what takes less.
        options: see `request.denoise.resolve_denoise`.

    Raises:
        LowvramError: see errors.py.
    """
    header = artifacts.read_header(Path(embeds), "embeds")
    made_for = swap(_model_of(Path(embeds), header, model), transformer=transformer, vae=vae)
    task = resolve_denoise(embeds, made_for, output, prompts=len(header.items), **options)
    if step_down and not (callback is None and on_preview is None):
        raise RequestError("step_down goes on where no callback is heard: leave one of them out")
    work = partial(denoise_stage.denoise, task, on_progress, callback, callback_steps, on_preview)
    return _stepping_down("denoise", task, work, step_down, on_progress)


def decode(
    latents: str | Path,
    *,
    output: str | Path,
    model: str | None = None,
    vae: str | Path | None = None,
    step_down: bool = False,
    on_progress: OnProgress = ignore,
    **options: Unpack[DecodeOptions],
) -> StageResult:
    """Latents to pictures, with the VAE alone.

    Args:
        output: x.png.
        model: None for the one that the latents were made for.
        vae: another one than the model's: see `swaps.swap`.
        step_down: after an out-of-memory, go on in a fresh process with what takes less.
        options: see `request.decode.resolve_decode`.

    Raises:
        LowvramError: see errors.py.
    """
    header = artifacts.read_header(Path(latents), "latents")
    made_for = swap(_model_of(Path(latents), header, model), vae=vae)
    task = resolve_decode(latents, made_for, output, **options)
    work = partial(decode_stage.decode, task, on_progress)
    return _stepping_down("decode", task, work, step_down, on_progress)


def _stepping_down(
    stage: str,
    task: AnyTask,
    work: Callable[[], StageResult],
    step_down: bool,
    on_progress: OnProgress,
) -> StageResult:
    """What `work` gives; or, where it runs out of memory, a fresh process with what takes less."""
    try:
        return work()
    except MemoryExhaustedError as error:
        if not step_down:
            raise
        first = error.with_traceback(None)
    log.warning("%s: trying what takes less", first)
    with StageProcesses() as processes:
        made = carry_one(stage, task, processes.run, on_progress, first)
    report = StageReport.from_json(made["report"])
    return StageResult([Path(path) for path in made["paths"]], made["items"], report)


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
    return refreshed(replace(model, sources={**model.sources, **on_hub}), made_for)
