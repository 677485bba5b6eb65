"""The same seed gives the same picture, whatever surrounds it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import lowvram
from lowvram import errors

PROMPTS = ["a red circle", "a large blue star in the top left corner of the picture", "two"]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """Each prompt by itself with seeds 5 and 6."""
    folder = tmp_path_factory.mktemp("alone")
    found = []
    for prompt in PROMPTS:
        result = lowvram.run(
            prompt, str(tiny), folder, seed=5, images_per_prompt=2, steps=3, in_process=True
        )
        found += [pixels(image.path) for image in result.images]
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_whatever_the_batch_and_its_order(
    batch_size: int, alone: list[np.ndarray], tiny: Path, tmp_path: Path
) -> None:
    result = lowvram.run(
        PROMPTS[::-1],
        str(tiny),
        tmp_path / "x.png",
        seed=5,
        images_per_prompt=2,
        steps=3,
        batch_size=batch_size,
        in_process=True,
    )
    assert [image.seed for image in result.images] == [5, 6] * 3
    assert [image.prompt for image in result.images] == [p for p in PROMPTS[::-1] for _ in "56"]
    for image, expected in zip(result.images, alone[4:] + alone[2:4] + alone[:2], strict=True):
        difference = np.abs(pixels(image.path) - expected).max()
        assert difference <= (0 if batch_size == 1 else 1)


def test_whatever_the_processes(alone: list[np.ndarray], tiny: Path, tmp_path: Path) -> None:
    result = lowvram.run(PROMPTS[0], str(tiny), tmp_path, seed=[6, 5], images_per_prompt=2, steps=3)
    assert np.array_equal(pixels(result.images[0].path), alone[1])
    assert np.array_equal(pixels(result.images[1].path), alone[0])


def test_seeds_and_prompts_matter(alone: list[np.ndarray]) -> None:
    for index, picture in enumerate(alone):
        for other in alone[index + 1 :]:
            assert not np.array_equal(picture, other)


def test_given_latents_replace_the_noise(tiny: Path, tmp_path: Path) -> None:
    noise = torch.randn((1, 4, 32, 32), generator=torch.Generator().manual_seed(11))
    save_file({"latents": noise}, tmp_path / "noise.safetensors")
    embeds = lowvram.encode("a red circle", str(tiny), output=tmp_path / "x.embeds.safetensors")
    made = {}
    for name, options in {
        "drawn": {"seed": 11},
        "given": {"seed": 3, "latents": tmp_path / "noise.safetensors"},
    }.items():
        path = tmp_path / f"{name}.latents.safetensors"
        lowvram.denoise(embeds.paths[0], output=path, steps=2, **options)
        made[name] = load_file(path)["latents"]
    assert torch.equal(made["drawn"], made["given"])


def test_a_run_has_a_callback_where_its_latents_are(tiny: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, torch.Tensor]] = []

    def callback(step: int, timestep: int, latents: torch.Tensor) -> None:
        seen.append((step, latents.clone()))

    result = lowvram.run(
        "a red circle", str(tiny), tmp_path / "x.png", steps=5, callback=callback,
        callback_steps=2, in_process=True,
    )  # fmt: skip
    assert [step for step, _ in seen] == [0, 2, 4]
    assert torch.equal(seen[-1][1], load_file(result.images[0].latents)["latents"])
    with pytest.raises(errors.RequestError, match="set in_process=True"):
        lowvram.run("a red circle", str(tiny), tmp_path / "x.png", callback=callback)
    with pytest.raises(errors.RequestError, match="callback_steps 0 is out of range"):
        lowvram.run("a cat", str(tiny), tmp_path / "x.png", callback_steps=0)


def test_callback_sees_what_the_pipelines_does(tiny: Path, tmp_path: Path) -> None:
    embeds = lowvram.encode("a red circle", str(tiny), output=tmp_path / "x.embeds.safetensors")
    seen: list[tuple[int, int, torch.Tensor]] = []
    result = lowvram.denoise(
        embeds.paths[0],
        output=tmp_path / "x.latents.safetensors",
        timesteps=[900, 500, 100],
        callback=lambda step, timestep, latents: seen.append((step, timestep, latents.clone())),
        callback_steps=2,
    )
    assert [(step, timestep) for step, timestep, _ in seen] == [(0, 900), (2, 100)]
    assert torch.equal(seen[-1][2], load_file(result.paths[0])["latents"])
