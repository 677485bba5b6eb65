"""PixArt-alpha against diffusers' own pipeline: sizes it is told of, few steps, and its names.

What it has in common with PixArt-Sigma is in test_one_shot.py, test_streamed.py and
test_family_contract.py, which take every family.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel
from safetensors.torch import load_file

import lowvram
from lowvram import errors, files
from lowvram.contents import component_key
from lowvram.families.pixart import FAMILY as SIGMA
from lowvram.families.pixart_alpha import FAMILY
from lowvram.repository import Model, resolve
from lowvram.request.denoise import resolve_denoise
from scripts.make_checkpoint import build, make_checkpoint
from tests.test_repository import put_in_cache
from tests.test_schedulers import NEGATIVES, PROMPTS, with_scheduler


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one that is told of its size, as the published 1024 px model."""
    folder = tmp_path_factory.mktemp("conditioned")
    make_checkpoint(folder, family="pixart-alpha", sample_size=128)
    return folder


FILE = "transformer/diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Case:
    """A request by lowvram's names; the pipeline's follow from it."""

    scheduler: str = "DPMSolverMultistepScheduler"
    options: dict[str, Any] = field(default_factory=lambda: {"steps": 3})
    guidance_scale: float = 3.0
    size: tuple[int, int] | None = None
    binning: bool = True
    conditioned: bool = False


CASES = {
    "told of its size": Case(size=(192, 320), binning=False, conditioned=True),
    "told of its size, unguided": Case(
        size=(320, 192), binning=False, conditioned=True, guidance_scale=1.0
    ),
    "told of the size computed": Case(
        "LCMScheduler", {"steps": 1}, 1.0, size=(500, 1500), conditioned=True
    ),
    "timesteps": Case(options={"timesteps": [900, 400, 20]}),
    "latent consistency": Case("LCMScheduler", {"steps": 4}, 1.0),
    "latent consistency, timesteps": Case("LCMScheduler", {"timesteps": [999, 499]}, 1.0),
    "one step": Case("DDPMScheduler", {"timesteps": [400]}, 1.0, size=(224, 288)),
    "one step, guided": Case("EulerDiscreteScheduler", {"timesteps": [900]}, 3.0),
}


def one_shot(folder: Path, case: Case) -> torch.Tensor:
    """Latents of diffusers' pipeline, two pictures for each prompt."""
    pipeline = PixArtAlphaPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    width, height = case.size or (None, None)
    found: torch.Tensor = pipeline(
        PROMPTS,
        negative_prompt=NEGATIVES,
        num_images_per_prompt=2,
        guidance_scale=case.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2, 3, 4)],
        width=width,
        height=height,
        use_resolution_binning=case.binning,
        output_type="latent",
        **{"num_inference_steps" if k == "steps" else k: v for k, v in case.options.items()},
    ).images
    return found


def staged(folder: Path, case: Case, tmp_path: Path, **options: Any) -> torch.Tensor:
    """The same by lowvram's stages."""
    embeds, latents = tmp_path / "x.embeds.safetensors", tmp_path / "x.latents.safetensors"
    lowvram.encode(
        PROMPTS, str(folder), output=embeds, negative_prompt=NEGATIVES, dtype="fp32", padding="max"
    )
    assert load_file(embeds)["0.prompt_embeds"].shape[0] == 120
    lowvram.denoise(
        embeds,
        output=latents,
        images_per_prompt=2,
        seed=[1, 2, 3, 4],
        guidance_scale=case.guidance_scale,
        size=case.size,
        binning=case.binning,
        **{"batch_size": 4, **case.options, **options},
    )
    return load_file(latents)["latents"]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_pipeline(
    name: str, tiny_alpha: Path, conditioned: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    source = conditioned if case.conditioned else tiny_alpha
    folder = with_scheduler(source, tmp_path / "model", case.scheduler, {})
    expected = one_shot(folder, case)
    assert torch.equal(staged(folder, case, tmp_path), expected)
    assert expected.std() > 0


def test_streamed_and_in_turn_it_is_told_the_same(conditioned: Path, tmp_path: Path) -> None:
    case = CASES["told of its size"]
    expected = one_shot(conditioned, case)
    for way in ({"weights": "stream"}, {"stage_budget": 4 << 20}):
        found = staged(conditioned, case, tmp_path, batch_size=1, **way)
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_the_size_makes_a_difference(conditioned: Path) -> None:
    network = PixArtTransformer2DModel.from_pretrained(conditioned / "transformer").eval()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 32, 32, generator=generator)
    text = {"prompt_embeds": torch.randn(1, 5, 64, generator=generator)}
    text["prompt_attention_mask"] = torch.ones(1, 5)
    with torch.inference_mode():
        told = FAMILY.predict(network, latents, torch.tensor(500), text, 1.0)
        network.adaln_single.emb.use_additional_conditions = False
        untold = FAMILY.predict(network, latents, torch.tensor(500), text, 1.0)
    assert (told - untold).abs().max() > 1e-3


def test_true_sizes() -> None:
    model = build(FAMILY.component("transformer"), FAMILY.published_configs["transformer"])
    assert model.use_additional_conditions
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 611_349_152  # 2.45 GB of float32, as published


@pytest.fixture
def hub(tmp_path: Path, tiny_alpha: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache with every published PixArt-alpha, tiny, laid out as it is published."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    files.commit.cache_clear()
    for number, entry in enumerate(FAMILY.models.values()):
        content = tmp_path / f"content-{number}"
        shutil.copytree(tiny_alpha, content)
        for role in entry.pickled:
            network = PixArtTransformer2DModel.from_pretrained(content / role)
            shutil.rmtree(content / role)
            network.save_pretrained(content / role, safe_serialization=False)
        if "scheduler" in entry.own:
            path = content / "scheduler" / "scheduler_config.json"
            path.write_text(json.dumps({"_class_name": "DDPMScheduler", "beta_schedule": "linear"}))
        if entry.base:
            for part in content.iterdir():
                if part.is_dir() and part.name not in entry.own:
                    shutil.rmtree(part)
            if "scheduler" not in entry.own:
                (content / "model_index.json").unlink()
        commit = f"{number}" * 40 if entry.revision == "main" else entry.revision
        put_in_cache(tmp_path / "hub", entry.repository, commit, content)
    return tmp_path / "hub"


def test_every_published_model_is_placed(hub: Path) -> None:
    found = {name: resolve(name) for name in FAMILY.models}
    defaults = {name: (m.steps, m.guidance_scale, m.timesteps) for name, m in found.items()}
    assert defaults == {
        "pixart-alpha-256": (20, 4.5, ()),
        "pixart-alpha-512": (20, 4.5, ()),
        "pixart-alpha-1024": (20, 4.5, ()),
        "pixart-alpha-1024-lcm": (4, 1.0, ()),
        "pixart-alpha-512-dmd": (1, 1.0, (400,)),
    }
    places = {role: source.place for role, source in found["pixart-alpha-512-dmd"].sources.items()}
    dmd, whole = "PixArt-Alpha-DMD-XL-2-512x512", "PixArt-XL-2-1024-MS"
    assert {role: place.split("/")[1] for role, place in places.items()} == {
        "tokenizer": whole,
        "text_encoder": whole,
        "transformer": dmd,
        "scheduler": dmd,
        "vae": whole,
    }
    for name, model in found.items():
        assert Model.from_record(json.loads(json.dumps(model.record()))) == model
        by_repository = resolve(FAMILY.models[name].repository)
        assert by_repository.timesteps == model.timesteps
        assert by_repository.steps == model.steps


def test_distilled_timesteps_are_the_default(hub: Path, tmp_path: Path) -> None:
    model = resolve("pixart-alpha-512-dmd")
    embeds, latents = tmp_path / "x.embeds.safetensors", tmp_path / "x.latents.safetensors"

    def timesteps(**options: Any) -> tuple[int, ...]:
        return resolve_denoise(embeds, model, latents, prompts=1, **options).timesteps

    assert timesteps() == (400,)
    assert timesteps(steps=4) == ()
    assert timesteps(timesteps=[300]) == (300,)


def test_one_step_from_what_is_published(
    hub: Path, tiny_alpha: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From a pickle, with the scheduler beside it and the rest from another repository."""
    caplog.set_level("INFO", "lowvram")
    config = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
    folder = with_scheduler(tiny_alpha, tmp_path / "same", "DDPMScheduler", config)
    place = resolve("pixart-alpha-512-dmd").fetch("transformer")
    for name, tensor in load_file(tiny_alpha / FILE).items():
        assert torch.equal(load_file(place / Path(FILE).name)[name], tensor)
    network = PixArtTransformer2DModel.from_pretrained(place)  # bits depend on a file's alignment
    pipeline = PixArtAlphaPipeline.from_pretrained(folder, transformer=network, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a red circle",
        num_inference_steps=1,
        timesteps=[400],
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images
    for _ in range(2):
        made = lowvram.run(
            "a red circle",
            "pixart-alpha-512-dmd",
            tmp_path / "x.png",
            seed=5,
            dtype="fp32",
            padding="max",
            in_process=True,
        )
        assert torch.equal(load_file(made.images[0].latents)["latents"], expected)
    assert caplog.text.count("is published as a pickle: converted once") == 1
    model = resolve("pixart-alpha-512-dmd")
    assert len(component_key(model, "transformer")) == 64


def test_a_pickle_that_runs_code_is_not_read(hub: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (pytest.fail, ("code of the pickle has run",))

    model = resolve("pixart-alpha-512-dmd")
    path = next(hub.rglob("diffusion_pytorch_model.bin"))
    path.write_bytes(path.read_bytes() + b" ")
    torch.save({"x": Evil()}, path)
    shutil.rmtree(files.user_cache() / "unpickled", ignore_errors=True)
    with pytest.raises(errors.ModelError, match="holds more than tensors"):
        model.fetch("transformer")


def test_a_lone_transformer_knows_its_family(tiny: Path, tiny_alpha: Path, hub: Path) -> None:
    for family, folder in ((SIGMA, tiny), (FAMILY, tiny_alpha)):
        config = json.loads((folder / "transformer" / "config.json").read_text())
        assert [each.name for each in (SIGMA, FAMILY) if each.claims(config)] == [family.name]
    shutil.rmtree(hub.parent / "alone", ignore_errors=True)
    shutil.copytree(tiny_alpha / "transformer", hub.parent / "alone")
    assert resolve(str(hub.parent / "alone")).family == "pixart-alpha"


def test_plan_and_budget(tiny_alpha: Path, tmp_path: Path) -> None:
    result = lowvram.run(
        "a red circle", str(tiny_alpha), tmp_path / "x.png", steps=2, device="cpu", vram=600 << 20
    )
    assert [stage["budget_bytes"] for stage in result.stages] == [600 << 20] * 3
    for stage in result.stages:
        foretold = stage["predicted"]["peak_allocated_bytes"]
        assert stage["peak_allocated_bytes"] <= foretold + 200_000  # as with PixArt-Sigma
