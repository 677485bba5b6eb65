"""What was asked, resolved once: after it nothing is open.

`resolve_encode`, `resolve_denoise` and `resolve_decode` check a user's words against the model's
configuration files (no weights, no torch) and return a task: a frozen value of JSON types that a
stage carries out, in this process or in another.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import Any, TypeVar

from lowvram import artifacts
from lowvram.errors import ArtifactError, ModelError, RequestError, StorageError
from lowvram.families.family import Size
from lowvram.repository import Model, resolve

WEIGHTS = ("auto", "whole", "8bit", "4bit", "stream")
TRANSFORMER_WEIGHTS = ("auto", "whole", "stream")
DECODES = ("auto", "whole", "strips", "blended")
DTYPES = ("auto", "fp32", "bf16", "fp16")
PADDINGS = ("none", "max")
MAX_SEED = 2**63 - 1
MAX_IMAGES = 10_000


@dataclass(frozen=True)
class EncodeTask:
    """Everything the encode stage needs. See `resolve_encode`."""

    model: dict[str, Any]
    output: str
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    weights: str
    dtype: str
    device: str
    clean_caption: bool
    padding: str
    max_tokens: int
    vram: int  # bytes that the process may take on the device; 0 for what is free
    stage_budget: int  # bytes that tensors may take there, which counts instead; 0 for none
    steps_down: int  # ways of working that have run out of memory already


@dataclass(frozen=True)
class DenoiseTask:
    """Everything the denoise stage needs. See `resolve_denoise`."""

    model: dict[str, Any]
    embeds: str
    output: str
    seeds: tuple[int, ...]  # one per picture, prompt by prompt
    images_per_prompt: int
    steps: int
    timesteps: tuple[int, ...]  # empty: the scheduler's own
    sigmas: tuple[float, ...]  # likewise
    guidance_scale: float
    requested: tuple[int, int]  # width, height in px
    rendered: tuple[int, int]
    eta: float
    latents: str  # a file of starting latents, "" to draw them
    weights: str
    dtype: str
    device: str
    batch_size: int
    vram: int
    stage_budget: int
    steps_down: int

    @property
    def asks_the_scheduler(self) -> bool:
        """Whether only the model's scheduler, or a file, can tell if this can be done."""
        return bool(self.timesteps or self.sigmas or self.eta or self.latents)


@dataclass(frozen=True)
class DecodeTask:
    """Everything the decode stage needs. See `resolve_decode`."""

    model: dict[str, Any]
    latents: str
    output: str
    decode: str
    dtype: str
    device: str
    batch_size: int
    vram: int
    stage_budget: int
    steps_down: int


AnyTask = EncodeTask | DenoiseTask | DecodeTask
Task = TypeVar("Task", bound=AnyTask)


def to_json(task: AnyTask) -> dict[str, Any]:
    """The task as JSON types."""
    return asdict(task)


def from_json(kind: type[Task], value: Mapping[str, Any]) -> Task:
    """The task that `to_json` described."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    return kind(**fields)


def resolve_encode(
    prompts: str | Sequence[str],
    model: Model,
    output: str | Path,
    *,
    negative_prompt: str | Sequence[str] = "",
    weights: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    clean_caption: bool = True,
    padding: str = "none",
    max_tokens: int | None = None,
    vram: int | None = None,
    stage_budget: int | None = None,
) -> EncodeTask:
    """Check what was asked of the encode stage.

    Args:
        prompts: one or many; each must say something.
        negative_prompt: one for all, or one for each.
        weights: how the text encoder's weights sit; "auto" takes whole where it fits, else
            stream.
        clean_caption: clean the text as the model's training captions were.
        padding: "none" encodes real tokens only; "max" pads as the diffusers pipeline does.
        max_tokens: at which text is cut; None for the family's limit.
        vram: bytes that the process may take on the device; None for what is free.
        stage_budget: bytes that tensors may take there, which counts instead; None for none.

    Raises:
        RequestError: names the value and the way out.
    """
    texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not texts or any(not text.strip() for text in texts):
        raise RequestError("the prompt is empty: say what the picture shall show")
    component = model.get_family().component("text_encoder")
    if dtype == component.overflows_in:
        raise RequestError(f"the text encoder overflows in {dtype}: use --dtype bf16 or fp32")
    negative = (
        (negative_prompt,) * len(texts)
        if isinstance(negative_prompt, str)
        else tuple(negative_prompt)
    )
    if len(negative) != len(texts):
        raise RequestError(
            f"{len(negative)} negative prompts for {len(texts)} prompts: give one, or as many"
        )
    if any(not _is_unicode(text) for text in (*texts, *negative)):
        raise RequestError("the prompt is not valid text: check the terminal's encoding")
    limit = model.get_family().max_tokens
    return EncodeTask(
        model=model.record(),
        output=_artifact(output),
        prompts=texts,
        negative_prompts=negative,
        weights=_one_of("--weights", weights, WEIGHTS),
        dtype=_one_of("--dtype", dtype, DTYPES),
        device=device,
        clean_caption=clean_caption,
        padding=_one_of("--padding", padding, PADDINGS),
        max_tokens=_in_range("--max-tokens", limit if max_tokens is None else max_tokens, 2, limit),
        vram=_budget("--vram", vram),
        stage_budget=_budget("--stage-budget", stage_budget),
        steps_down=0,
    )


def resolve_denoise(
    embeds: str | Path,
    model: Model,
    output: str | Path,
    *,
    prompts: int,
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
) -> DenoiseTask:
    """Check what was asked of the denoise stage.

    Args:
        embeds: path of the encode stage's file.
        prompts: how many prompts that file holds.
        seed: of the first picture of each prompt, the next ones count up; or one per picture of a
            prompt; or one per picture in all, prompt by prompt.
        images_per_prompt: None for one, or as many as there are seeds.
        steps: None for the model's default; or give `timesteps` (descending) or `sigmas`.
        guidance_scale: None for the model's default; 1 or less turns guidance off.
        size: width and height in px; None for the model's own.
        binning: compute at the nearest size the model was trained on, resize after decoding.
        eta: noise added in each step, for schedulers that take it (DDIM).
        latents: a safetensors file with `latents` `[pictures, channels, height, width]`, standard
            normal, to start from instead of drawing noise.
        weights: how the transformer's weights sit; "auto" takes whole where it fits, else
            stream.
        batch_size: pictures per call of the transformer.
        vram: bytes that the process may take on the device; None for what is free.
        stage_budget: bytes that tensors may take there, which counts instead; None for none.

    Raises:
        RequestError: names the value and the way out.
    """
    seeds, images = _seeds(seed, images_per_prompt, prompts)
    if (timesteps and sigmas) or (steps is not None and (timesteps or sigmas)):
        raise RequestError("--steps, --timesteps and --sigmas exclude each other: give one")
    if timesteps and list(timesteps) != sorted(set(timesteps), reverse=True):
        raise RequestError(f"timesteps must descend without repeats: {list(timesteps)}")
    if timesteps and not 0 <= min(timesteps) <= max(timesteps) < 1000:
        raise RequestError(f"timesteps must lie between 999 and 0: {list(timesteps)}")
    if sigmas and not all(0 <= low < high < 1e6 for high, low in pairwise((1e5, *sigmas))):
        raise RequestError(f"sigmas must be positive and descend: {list(sigmas)}")
    if not 0 <= eta <= 1:
        raise RequestError(f"--eta {eta} is out of range: 0 to 1")
    configs = {role: model.config(role) for role in ("transformer", "vae", "scheduler")}
    asked = size if size is None or isinstance(size, Size) else Size(*size)
    try:
        requested, rendered = model.get_family().render_size(configs, asked, binning)
    except (KeyError, TypeError) as error:
        raise ModelError(f"{model.name} has a configuration that lacks {error}") from None
    chosen_guidance = model.guidance_scale if guidance_scale is None else guidance_scale
    if not 0 <= chosen_guidance <= 100:  # NaN fails this too
        raise RequestError(f"--guidance {guidance_scale} is out of range: 0 to 100")
    if latents is not None and not Path(latents).is_file():
        raise RequestError(f"starting latents {latents} do not exist: check --latents")
    return DenoiseTask(
        model=model.record(),
        embeds=str(embeds),
        output=_artifact(output, embeds, latents),
        seeds=seeds,
        images_per_prompt=images,
        steps=_in_range("--steps", model.steps if steps is None else steps, 1, 1000),
        timesteps=tuple(timesteps or ()),
        sigmas=tuple(float(sigma) for sigma in sigmas or ()),
        guidance_scale=float(chosen_guidance),
        requested=(requested.width, requested.height),
        rendered=(rendered.width, rendered.height),
        eta=float(eta),
        latents="" if latents is None else str(latents),
        weights=_one_of("--weights", weights, TRANSFORMER_WEIGHTS),
        dtype=_one_of("--dtype", dtype, DTYPES),
        device=device,
        batch_size=_in_range("--batch-size", batch_size, 1, 4096),
        vram=_budget("--vram", vram),
        stage_budget=_budget("--stage-budget", stage_budget),
        steps_down=0,
    )


def resolve_decode(
    latents: str | Path,
    model: Model,
    output: str | Path,
    *,
    decode: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    batch_size: int = 1,
    vram: int | None = None,
    stage_budget: int | None = None,
) -> DecodeTask:
    """Check what was asked of the decode stage.

    Args:
        latents: path of the denoise stage's file.
        output: the picture, or for several a pattern: x.png becomes x-0.png, x-1.png, …
        decode: "whole", "strips" (the same pixels) or "blended" (diffusers' tiles, not the same);
            "auto" takes whole where it fits, else strips.
        batch_size: pictures per call of the VAE.
        vram: bytes that the process may take on the device; None for what is free.
        stage_budget: bytes that tensors may take there, which counts instead; None for none.

    Raises:
        RequestError: names the value and the way out.
    """
    if Path(output).suffix.lower() != ".png":
        raise RequestError(f"{output} does not end in .png: pictures are written as PNG")
    _check_writable(Path(output))
    if dtype == "fp16" and model.config("vae").get("force_upcast", True):  # diffusers' default
        raise RequestError("this VAE overflows in fp16 (its force_upcast): use --dtype fp32")
    return DecodeTask(
        model=model.record(),
        latents=str(latents),
        output=str(output),
        decode=_one_of("--decode", decode, DECODES),
        dtype=_one_of("--dtype", dtype, DTYPES),
        device=device,
        batch_size=_in_range("--batch-size", batch_size, 1, 4096),
        vram=_budget("--vram", vram),
        stage_budget=_budget("--stage-budget", stage_budget),
        steps_down=0,
    )


def model_of(path: Path, header: artifacts.Header, name: str | None) -> Model:
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


def _seeds(
    seed: int | Sequence[int], images: int | None, prompts: int
) -> tuple[tuple[int, ...], int]:
    """One seed per picture, prompt by prompt; and the pictures per prompt."""
    if isinstance(seed, Sequence):
        images = _in_range("--images", len(seed) if images is None else images, 1, MAX_IMAGES)
        seeds = tuple(index(each) for each in seed) * (prompts if len(seed) == images else 1)
    else:
        images = _in_range("--images", 1 if images is None else images, 1, MAX_IMAGES)
        seeds = tuple(range(index(seed), index(seed) + images)) * prompts
    if len(seeds) != images * prompts:
        raise RequestError(
            f"{len(seeds)} seeds for {images * prompts} pictures "
            f"({prompts} prompts, {images} each): "
            "give one seed, as many as --images, or one for each picture"
        )
    if not all(0 <= each <= MAX_SEED for each in seeds):
        raise RequestError(f"seeds must be between 0 and {MAX_SEED}: {seed}")
    return seeds, images


def _artifact(path: str | Path, *inputs: str | Path | None) -> str:
    """The path of a file that a stage will write, after a look that it can."""
    if Path(path).suffix != ".safetensors":
        raise RequestError(f"{path} does not end in .safetensors, which this stage writes")
    for each in inputs:
        if each is not None and Path(each).resolve() == Path(path).resolve():
            raise RequestError(f"{path} is the input: name another file with -o")
    _check_writable(Path(path))
    return str(path)


def _check_writable(path: Path) -> None:
    """Find out before minutes of work that a file cannot be written.

    Raises:
        StorageError: it is a folder, or its folder cannot be made or written.
    """
    if path.is_dir():
        raise StorageError(f"{path} is a folder: name a file with -o")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise StorageError(f"{folder} cannot be written to: choose another place with -o")


def _is_unicode(text: str) -> bool:
    """False for what a terminal in another encoding can leave in an argument."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one_of(option: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise RequestError(f"{option} {value} is not known: use {', '.join(allowed)}")
    return value


def _budget(option: str, size: int | None) -> int:
    """Bytes; 0 for none."""
    if size is not None and not 1 << 20 <= size < 1 << 50:
        raise RequestError(f"{option} {size} bytes is not 1 MiB to 1 PiB: write it as 0.5GiB")
    return size or 0


def _in_range(option: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise RequestError(f"{option} {value} is out of range: {least} to {most}")
    return int(value)
