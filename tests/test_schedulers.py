"""Schedulers of every kind agree with the pipeline, with all that concerns them set."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import lowvram
from lowvram import errors
from lowvram.pixels.png import read_record
from lowvram.repository import Model, resolve
from lowvram.request.denoise import DenoiseTask, resolve_denoise
from lowvram.stages import denoise
from lowvram.stages.schedule import SchedulerMaker, scheduler_maker

PROMPTS = ["a red circle", "two green stars on a blue background"]
NEGATIVES = ["blurry", "a dog in the rain"]
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "eta": ("DDIMScheduler", {}, {"eta": 0.5, "steps": 3}),
    "sigmas": ("EulerDiscreteScheduler", {}, {"sigmas": [14.0, 3.0, 0.5]}),
    "timesteps": ("DPMSolverMultistepScheduler", {}, {"timesteps": [900, 500, 20]}),
    "stochastic": ("EulerAncestralDiscreteScheduler", {}, {"steps": 3}),
    "sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {"steps": 3}),
    "second order": ("HeunDiscreteScheduler", {}, {"steps": 3}),
}


def with_scheduler(tiny: Path, folder: Path, name: str, settings: dict[str, Any]) -> Path:
    """A copy of the tiny checkpoint with another scheduler."""
    shutil.copytree(tiny, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings | {"_class_name": name}))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", name]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_pipeline(kind: str, tiny: Path, tmp_path: Path) -> None:
    name, settings, options = KINDS[kind]
    folder = with_scheduler(tiny, tmp_path / "model", name, settings)
    pipeline = diffusers.PixArtSigmaPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [1, 2, 3, 4]
    given = {"num_inference_steps" if k == "steps" else k: v for k, v in options.items()}
    expected = pipeline(
        PROMPTS,
        negative_prompt=NEGATIVES,
        num_images_per_prompt=2,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **given,
    ).images
    embeds, latents = tmp_path / "x.embeds.safetensors", tmp_path / "x.latents.safetensors"
    lowvram.encode(
        PROMPTS,
        str(folder),
        output=embeds,
        negative_prompt=NEGATIVES,
        dtype="fp32",
        padding="max",
    )
    lowvram.denoise(
        embeds,
        output=latents,
        images_per_prompt=2,
        seed=seeds,
        guidance_scale=3.0,
        batch_size=4,
        **options,
    )
    assert torch.equal(load_file(latents)["latents"], expected)


def test_what_a_scheduler_cannot_do_is_refused_before_the_encoder_runs(
    tiny: Path, tmp_path: Path
) -> None:
    for options in ({"eta": 0.5}, {"sigmas": [9.0, 1.0]}):
        with pytest.raises(errors.RequestError, match="DPMSolverMultistepScheduler"):
            lowvram.run("a cat", str(tiny), tmp_path / "x.png", in_process=True, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_scheduler_is_named(tiny: Path, tmp_path: Path) -> None:
    folder = with_scheduler(tiny, tmp_path / "model", "NoSuchScheduler", {})
    embeds = tmp_path / "x.embeds.safetensors"
    lowvram.encode("a cat", str(folder), output=embeds)
    with pytest.raises(errors.ModelError, match="'NoSuchScheduler' is not one of diffusers'"):
        lowvram.denoise(embeds, output=tmp_path / "x.latents.safetensors")


@pytest.mark.parametrize(
    ("scheduler", "options", "steps"),
    [
        ("euler", {"sigmas": [14.0, 3.0, 0.5]}, 2),  # the last level is where it ends
        ("euler", {"timesteps": [900, 500, 20]}, 3),
        ("heun", {"timesteps": [900, 500, 20]}, 3),  # five calls of the network
        ("heun", {"steps": 3}, 3),
    ],
)
def test_the_files_say_how_many_steps_were_done(
    scheduler: str, options: dict[str, Any], steps: int, tiny: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "x.png"
    seen: list[int] = []
    lowvram.run(
        "a red circle",
        str(tiny),
        picture,
        scheduler=scheduler,
        in_process=True,
        callback=lambda step, *_: seen.append(step),
        **options,
    )
    assert len(seen) == steps
    record = read_record(picture)
    assert record["denoise"]["steps"] == steps
    with Image.open(picture) as image:
        assert f"Steps: {steps}, " in image.info["parameters"]


def test_a_list_tries_a_scheduler_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[DenoiseTask] = []

    def counted(task: DenoiseTask, model: Model) -> SchedulerMaker:
        made.append(task)
        return scheduler_maker(task, model)

    monkeypatch.setattr(denoise, "scheduler_maker", counted)
    model = resolve(str(tiny))
    tasks = [
        resolve_denoise("x", model, tmp_path / f"{seed}.safetensors", prompts=1, seed=seed, eta=eta)
        for seed, eta in ((1, 0.0), (2, 0.0), (3, 0.5), (4, 0.0), (5, 0.5))
    ]
    refused: dict[int, object] = {}
    denoise.check_each(tasks, refused.__setitem__)
    assert sorted(refused) == [2, 4]  # DPM-Solver knows no eta
    assert [task.eta for task in made] == [0.0, 0.5, 0.5]
