"""What was asked of the decode stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from lowvram.errors import RequestError
from lowvram.repository import Model
from lowvram.request.checks import budget, check_writable, in_range, one_of
from lowvram.request.encode import DTYPES

DECODES = ("auto", "whole", "strips", "blended")


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


class DecodeOptions(TypedDict, total=False):
    """What may be asked for; see `resolve_decode`."""

    decode: str
    dtype: str
    device: str
    batch_size: int
    vram: int | None
    stage_budget: int | None


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
    check_writable(Path(output))
    if dtype == "fp16" and model.vae_upcasts:
        raise RequestError("this VAE overflows in fp16 (its force_upcast): use --dtype fp32")
    return DecodeTask(
        model=model.record(),
        latents=str(latents),
        output=str(output),
        decode=one_of("--decode", decode, DECODES),
        dtype=one_of("--dtype", dtype, DTYPES),
        device=device,
        batch_size=in_range("--batch-size", batch_size, 1, 4096),
        vram=budget("--vram", vram),
        stage_budget=budget("--stage-budget", stage_budget),
        steps_down=0,
    )


def picture_paths(output: Path, count: int) -> list[Path]:
    """The files of `count` pictures: the output itself, or numbered ones beside it."""
    if count == 1:
        return [output]
    digits = len(str(count - 1))
    return [output.with_stem(f"{output.stem}-{index:0{digits}}") for index in range(count)]
