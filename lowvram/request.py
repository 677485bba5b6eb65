"""What was asked, resolved once: after it nothing is open.

`resolve_encode`, `resolve_denoise` and `resolve_decode` check a user's words against the model's
configuration files (no weights, no torch) and return a task: a frozen value of JSON types that a
stage carries out, in this process or in another.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from lowvram import artifacts
from lowvram.errors import ArtifactError, RequestError
from lowvram.families.family import Size
from lowvram.repository import Model, resolve

WEIGHTS = ("auto", "whole", "8bit", "4bit")
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
    dtype: str
    device: str
    batch_size: int


@dataclass(frozen=True)
class DecodeTask:
    """Everything the decode stage needs. See `resolve_decode`."""

    model: dict[str, Any]
    latents: str
    output: str
    dtype: str
    device: str
    batch_size: int


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
) -> EncodeTask:
    """Check what was asked of the encode stage.

    Args:
        prompts: one or many; each must say something.
        negative_prompt: one for all, or one for each.
        weights: how the text encoder's weights sit; "auto" takes 8bit on a GPU, else whole.
        clean_caption: clean the text as the model's training captions were.
        padding: "none" encodes real tokens only; "max" pads as the diffusers pipeline does.
        max_tokens: at which text is cut; None for the family's limit.

    Raises:
        RequestError: names the value and the way out.
    """
    texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not texts or any(not text.strip() for text in texts):
        raise RequestError("the prompt is empty: say what the picture shall show")
    negative = (
        (negative_prompt,) * len(texts)
        if isinstance(negative_prompt, str)
        else tuple(negative_prompt)
    )
    if len(negative) != len(texts):
        raise RequestError(
            f"{len(negative)} negative prompts for {len(texts)} prompts: give one, or as many"
        )
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
        max_tokens=_in_range("--max-tokens", max_tokens or limit, 2, limit),
    )


def resolve_denoise(
    embeds: str | Path,
    model: Model,
    output: str | Path,
    *,
    prompts: int,
    seed: int | Sequence[int] = 0,
    images_per_prompt: int = 1,
    steps: int | None = None,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    guidance_scale: float | None = None,
    size: Size | tuple[int, int] | None = None,
    binning: bool = True,
    eta: float = 0.0,
    latents: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    batch_size: int = 1,
) -> DenoiseTask:
    """Check what was asked of the denoise stage.

    Args:
        embeds: path of the encode stage's file.
        prompts: how many prompts that file holds.
        seed: of the first picture of each prompt, the next ones count up; or one per picture of a
            prompt; or one per picture in all, prompt by prompt.
        steps: None for the model's default; or give `timesteps` (descending) or `sigmas`.
        guidance_scale: None for the model's default; 1 or less turns guidance off.
        size: width and height in px; None for the model's own.
        binning: compute at the nearest size the model was trained on, resize after decoding.
        eta: noise added in each step, for schedulers that take it (DDIM).
        latents: a safetensors file with `latents` `[pictures, channels, height, width]`, standard
            normal, to start from instead of drawing noise.
        batch_size: pictures per call of the transformer.

    Raises:
        RequestError: names the value and the way out.
    """
    images = _in_range("--images", images_per_prompt, 1, MAX_IMAGES)
    if (timesteps and sigmas) or (steps is not None and (timesteps or sigmas)):
        raise RequestError("--steps, --timesteps and --sigmas exclude each other: give one")
    if timesteps and list(timesteps) != sorted(set(timesteps), reverse=True):
        raise RequestError(f"timesteps must descend without repeats: {list(timesteps)}")
    if timesteps and not 0 <= min(timesteps) <= max(timesteps) < 1000:
        raise RequestError(f"timesteps must lie between 999 and 0: {list(timesteps)}")
    if not 0 <= eta <= 1:
        raise RequestError(f"--eta {eta} is out of range: 0 to 1")
    configs = {role: model.config(role) for role in ("transformer", "vae")}
    requested, rendered = model.get_family().render_size(
        configs, Size(*size) if isinstance(size, tuple) else size, binning
    )
    chosen_guidance = model.guidance_scale if guidance_scale is None else guidance_scale
    if not 0 <= chosen_guidance <= 100:  # NaN fails this too
        raise RequestError(f"--guidance {guidance_scale} is out of range: 0 to 100")
    if latents is not None and not Path(latents).is_file():
        raise RequestError(f"starting latents {latents} do not exist: check --latents")
    return DenoiseTask(
        model=model.record(),
        embeds=str(embeds),
        output=_artifact(output),
        seeds=_seeds(seed, images, prompts),
        images_per_prompt=images,
        steps=_in_range("--steps", model.steps if steps is None else steps, 1, 1000),
        timesteps=tuple(timesteps or ()),
        sigmas=tuple(float(sigma) for sigma in sigmas or ()),
        guidance_scale=float(chosen_guidance),
        requested=(requested.width, requested.height),
        rendered=(rendered.width, rendered.height),
        eta=float(eta),
        latents="" if latents is None else str(latents),
        dtype=_one_of("--dtype", dtype, DTYPES),
        device=device,
        batch_size=_in_range("--batch-size", batch_size, 1, 4096),
    )


def resolve_decode(
    latents: str | Path,
    model: Model,
    output: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    batch_size: int = 1,
) -> DecodeTask:
    """Check what was asked of the decode stage.

    Args:
        latents: path of the denoise stage's file.
        output: the picture, or for several a pattern: x.png becomes x-0.png, x-1.png, …
        batch_size: pictures per call of the VAE.

    Raises:
        RequestError: names the value and the way out.
    """
    if Path(output).suffix.lower() != ".png":
        raise RequestError(f"{output} does not end in .png: pictures are written as PNG")
    if dtype == "fp16" and model.config("vae").get("force_upcast", True):  # diffusers' default
        raise RequestError("this VAE overflows in fp16 (its force_upcast): use --dtype fp32")
    return DecodeTask(
        model=model.record(),
        latents=str(latents),
        output=str(output),
        dtype=_one_of("--dtype", dtype, DTYPES),
        device=device,
        batch_size=_in_range("--batch-size", batch_size, 1, 4096),
    )


def model_of(path: Path, header: artifacts.Header, name: str | None) -> Model:
    """The model that a file was made for.

    Args:
        name: what the user named with -m; None to trust the file.

    Raises:
        ArtifactError: the user named another model than the file's.
    """
    if name is None:
        return Model.from_record(header.model)
    model = resolve(name)
    made_for = header.model.get("name")
    if (model.name, model.family) != (made_for, header.model.get("family")):
        raise ArtifactError(
            f"{path} was made for {made_for}, but --model is {name}: encode again, or drop --model"
        )
    return model


def parse_size(text: str) -> Size:
    """Width and height from "WxH" in px.

    Raises:
        RequestError: not of that form.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX×]\s*(\d{1,6})\s*", text)
    if match is None:
        raise RequestError(f"size {text!r} is not WIDTHxHEIGHT: for example 1024x768")
    return Size(int(match[1]), int(match[2]))


def parse_seeds(text: str) -> int | list[int]:
    """A seed, or a list with ranges: "7", "1,2,5", "3-6".

    Raises:
        RequestError: not of that form, or more than `MAX_IMAGES`.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,19})(?:\s*-\s*(\d{1,19}))?\s*", part)
        first = int(match[1]) if match else 0
        last = int(match[2] or match[1]) if match else -1
        if last < first or last - first >= MAX_IMAGES:
            raise RequestError(f"seed {text!r} is not a number, list or range: 7, 1,2,5 or 3-6")
        seeds += range(first, last + 1)
    return seeds[0] if len(seeds) == 1 else seeds


def parse_numbers(option: str, text: str) -> list[float]:
    """Comma-separated numbers.

    Raises:
        RequestError: something in it is no number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"{option} {text!r} is not a list of numbers: 999,750,500") from None


def _seeds(seed: int | Sequence[int], images: int, prompts: int) -> tuple[int, ...]:
    """One seed per picture, prompt by prompt."""
    if isinstance(seed, int):
        seeds = tuple(range(seed, seed + images)) * prompts
    else:
        seeds = tuple(seed) * (prompts if len(seed) == images else 1)
    if len(seeds) != images * prompts:
        raise RequestError(
            f"{len(seeds)} seeds for {images * prompts} pictures "
            f"({prompts} prompts, {images} each): give one, {images} or {images * prompts}"
        )
    if not all(0 <= each <= MAX_SEED for each in seeds):
        raise RequestError(f"seeds must be between 0 and {MAX_SEED}: {seed}")
    return seeds


def _artifact(path: str | Path) -> str:
    if Path(path).suffix != ".safetensors":
        raise RequestError(f"{path} does not end in .safetensors, which this stage writes")
    return str(path)


def _one_of(option: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise RequestError(f"{option} {value} is not known: use {', '.join(allowed)}")
    return value


def _in_range(option: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise RequestError(f"{option} {value} is out of range: {least} to {most}")
    return int(value)
