"""The ground everything stands on: a staged run equals diffusers' one-shot pipeline.

Bit for bit in fp32 on the CPU when text is padded as the pipeline pads it; within 1e-5 relative
with real tokens only.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import lowvram
from lowvram.repository import resolve


@dataclass(frozen=True)
class Case:
    """One request, for both sides."""

    prompts: tuple[str, ...]
    guidance_scale: float
    size: tuple[int, int]  # width, height
    negative: str = ""
    steps: int = 4


CASES = {
    "guided": Case(("A red circle, at the top.",), 4.5, (256, 256)),
    "unguided": Case(("a red circle",), 1.0, (256, 256)),
    "several, not square": Case(
        ("a red circle", "two green stars on a blue background"), 3.0, (192, 320), negative="blurry"
    ),
}


@pytest.fixture(params=["tiny", "tiny_alpha", "demo"])
def model(request: pytest.FixtureRequest) -> str:
    return "demo" if request.param == "demo" else str(request.getfixturevalue(request.param))


def one_shot(model: str, case: Case, binning: bool) -> tuple[torch.Tensor, list[Image.Image]]:
    """Latents `[pictures, channels, height, width]` and pictures of the diffusers pipeline."""
    folder = resolve(model).sources["vae"].folder
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    seen: list[torch.Tensor] = []
    pictures = pipeline(
        list(case.prompts),
        negative_prompt=case.negative,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance_scale,
        width=case.size[0],
        height=case.size[1],
        generator=[torch.Generator().manual_seed(7) for _ in case.prompts],
        use_resolution_binning=binning,
        callback=lambda step, timestep, latents: seen.append(latents.clone()),
    ).images
    return seen[-1], pictures


def staged(
    model: str, case: Case, binning: bool, padding: str, folder: Path, in_process: bool
) -> tuple[torch.Tensor, list[Image.Image]]:
    """The same of `lowvram.run`."""
    result = lowvram.run(
        case.prompts,
        model,
        folder / "x.png",
        negative_prompt=case.negative,
        steps=case.steps,
        guidance_scale=case.guidance_scale,
        size=case.size,
        binning=binning,
        seed=7,
        padding=padding,
        dtype="fp32",
        device="cpu",
        batch_size=len(case.prompts),
        in_process=in_process,
    )
    latents = load_file(result.images[0].latents)["latents"]
    return latents, [opened(image.path) for image in result.images]


def opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.copy()


@pytest.mark.parametrize("name", CASES)
def test_equals_the_pipeline(name: str, model: str, tmp_path: Path) -> None:
    case, binning = CASES[name], model != "demo"  # diffusers has no bins for the demo's size
    expected, expected_pictures = one_shot(model, case, binning)
    in_process = name != "several, not square"
    latents, pictures = staged(model, case, binning, "max", tmp_path, in_process)
    assert torch.equal(latents, expected)
    for picture, expected_picture in zip(pictures, expected_pictures, strict=True):
        assert picture.size == case.size
        assert picture.tobytes() == expected_picture.tobytes()

    short, _ = staged(model, case, binning, "none", tmp_path / "short", True)
    assert (short - expected).norm() <= 1e-5 * expected.norm()
    assert not torch.equal(expected, torch.zeros_like(expected))
