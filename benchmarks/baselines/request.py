"""What every contender is asked for, the same for all."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PROMPTS = Path(__file__).with_name("prompts.txt")
GUIDANCE = 4.5  # the default of PixArtSigmaPipeline.__call__ and of lowvram
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}

# What every pipeline is told besides: the text as it stands (the cleaning that is the default
# needs two more packages and is dropped without them), and exactly the size that was asked.
SAME_FOR_ALL: dict[str, Any] = {
    "clean_caption": False,
    "use_resolution_binning": False,
    "guidance_scale": GUIDANCE,
}


@dataclass(frozen=True)
class Request:
    """One run of a contender.

    Attributes:
        model: a folder in diffusers layout.
        size: side of the square pictures, px.
        device: "cuda" or "cpu".
        limit: bytes that the process may take on the card; None for no cap.
        dtype: of `DTYPES`; what a pipeline is loaded in.
        seed: of every picture: each prompt gets the same noise.
        latents: a safetensors file with finished `latents` [1, 4, height/8, width/8]: they are
            decoded and nothing else is done. None to make pictures of prompts.
        budget: bytes, of lowvram alone (`--vram`); None for none.
        stage_budget: bytes, of lowvram alone (`--stage-budget`); None for none.
    """

    contender: str
    model: Path
    prompts: tuple[str, ...]
    size: int
    steps: int
    device: str
    limit: int | None
    dtype: str
    output: Path
    seed: int
    latents: Path | None
    budget: int | None
    stage_budget: int | None

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The dtype as torch has it."""
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self.dtype])
        return dtype

    def noise(self) -> "Tensor":
        """What a picture starts from, `[1, 4, size/8, size/8]`, on the CPU, in the run's dtype.

        As `lowvram.stages.starts.first_latents` draws it: float32 from a CPU generator, then
        rounded. A pipeline that draws for itself would do so in the dtype of its embeddings.
        """
        import torch

        generator = torch.Generator("cpu").manual_seed(self.seed)
        shape = (1, 4, self.size // 8, self.size // 8)
        return torch.randn(shape, generator=generator).to(self.torch_dtype)

    def picture(self, index: int) -> Path:
        """Where the picture of a prompt goes."""
        return self.output / f"picture-{index:03d}.png"


def first_prompts(count: int) -> tuple[str, ...]:
    """The first so many of the fixed list."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    if not 1 <= count <= len(lines):
        raise ValueError(f"{count} prompts: the list has 1 to {len(lines)}")
    return tuple(lines[:count])
