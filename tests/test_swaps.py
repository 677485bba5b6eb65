"""One component from elsewhere: as the pipeline with that component, recorded, or refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, PixArtTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from transformers import T5EncoderModel

import lowvram
from lowvram import artifacts, cli, errors
from lowvram.repository import Model, resolve
from lowvram.swaps import resolve_with, swap
from scripts.make_checkpoint import make_checkpoint
from tests.test_repository import offline, put_in_cache  # noqa: F401 - a fixture

CLASSES = {
    "transformer": PixArtTransformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": T5EncoderModel,
}
LAYOUTS = ("whole", "alone")
COMMIT = "c" * 40


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another checkpoint of the same configurations."""
    folder = tmp_path_factory.mktemp("other")
    make_checkpoint(folder, seed=1)
    return folder


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


def changed(folder: Path, role: str, tmp_path: Path, **config: Any) -> Path:
    """A component alone with another configuration; its weights do not matter."""
    place = tmp_path / f"changed-{role}"
    shutil.copytree(folder / role, place)
    path = place / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return place


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("role", CLASSES)
def test_equals_the_pipeline_with_that_component(
    role: str, layout: str, tiny: Path, other: Path, tmp_path: Path
) -> None:
    place = other if layout == "whole" else other / role
    component = CLASSES[role].from_pretrained(other / role)
    pipeline = DiffusionPipeline.from_pretrained(tiny, **{role: component.eval()})
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a red circle",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    result = lowvram.run(
        "a red circle",
        str(tiny),
        tmp_path / "x.png",
        steps=2,
        seed=3,
        padding="max",
        dtype="fp32",
        in_process=True,
        **{role: place},
    )
    with Image.open(result.images[0].path) as picture:
        assert picture.tobytes() == expected.tobytes()
        record = json.loads(picture.info["lowvram"])
    assert record["model"]["swapped"][role] == place.name
    assert str(tmp_path.parent) not in json.dumps(record)


def test_stage_by_stage_is_the_same_as_a_run(
    tiny: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = {"transformer": other, "vae": other / "vae", "text_encoder": other}
    run = lowvram.run(
        "a cat", str(tiny), tmp_path / "run.png", steps=1, in_process=True, **everything
    )
    embeds, latents = tmp_path / "x.embeds.safetensors", tmp_path / "x.latents.safetensors"
    for line in (
        ["encode", "a cat", "-m", str(tiny), "--text-encoder", str(other), "-o", str(embeds)],
        ["denoise", str(embeds), "--transformer", str(other), "--steps", "1"],
        ["decode", str(latents), "--vae", str(other / "vae")],
    ):
        assert cli.exit_code(line) == 0, capsys.readouterr().err
    made = load_file(latents)["latents"]
    assert torch.equal(made, load_file(run.images[0].latents)["latents"])
    assert pixels(tmp_path / "x.png") == pixels(tmp_path / "run.png")
    header = artifacts.read_header(latents, "latents")
    model = Model.from_record(header.model)
    assert model.swapped == ("text_encoder", "tokenizer", "transformer")
    assert model.sources["transformer"].place == str(other)
    assert model.sources["vae"].place == str(tiny)


def test_later_stages_know_it_and_notice_a_change(tiny: Path, other: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(other / "vae", mine)
    embeds, latents = tmp_path / "x.embeds.safetensors", tmp_path / "x.latents.safetensors"
    lowvram.encode("a cat", str(tiny), output=embeds)
    plain = lowvram.denoise(embeds, output=latents, steps=1)
    lowvram.decode(plain.paths[0], output=tmp_path / "other.png", vae=mine)
    lowvram.decode(plain.paths[0], output=tmp_path / "own.png")
    assert pixels(tmp_path / "other.png") != pixels(tmp_path / "own.png")

    encoder = tmp_path / "encoder"
    shutil.copytree(other / "text_encoder", encoder)
    lowvram.encode("a cat", str(tiny), output=embeds, text_encoder=encoder)
    lowvram.denoise(embeds, output=latents, steps=1, model=str(tiny))
    model = Model.from_record(artifacts.read_header(latents, "latents").model)
    assert model.swapped == ("text_encoder",)
    assert model.fetch("text_encoder") == encoder
    (encoder / "config.json").write_text("{}")
    with pytest.raises(errors.ModelError, match="has changed since"):
        model.fetch("text_encoder")


def test_what_does_not_go_together_is_refused(tiny: Path, tmp_path: Path) -> None:
    model = resolve(str(tiny))
    for role, config, said in (
        (
            "text_encoder",
            {"d_model": 32},
            "encoder makes 32 channels, and the transformer takes 64",
        ),
        ("vae", {"latent_channels": 16}, "transformer makes 4 channels, and the VAE takes 16"),
        (
            "transformer",
            {"caption_channels": 96},
            "makes 64 channels, and the transformer takes 96",
        ),
        ("vae", {"block_out_channels": [8, 16, 16]}, "the VAE makes 4 px of a cell"),
    ):
        place = changed(tiny, role, tmp_path, **config)
        with pytest.raises(errors.RequestError, match=said):
            swap(model, **{role: place})
        shutil.rmtree(place)


def test_another_class_is_refused(tiny: Path, tiny_alpha: Path, tmp_path: Path) -> None:
    model = resolve(str(tiny))
    for role, place, said in (
        ("vae", tiny / "transformer", "is no AutoencoderKL"),
        ("text_encoder", tiny / "vae", "is no T5EncoderModel"),
        ("transformer", tiny_alpha, r"for pixart-sigma \(its configuration is of another family\)"),
        ("transformer", tiny / "scheduler", "neither transformer/config.json nor config.json"),
        ("vae", tmp_path / "nowhere", "neither a folder that exists"),
    ):
        with pytest.raises(errors.ModelError, match=said):
            swap(model, **{role: place})


def test_a_text_encoder_is_known_by_its_network(tiny_refiner: Path, tmp_path: Path) -> None:
    """Whatever class it was saved from: SDXL's is a CLIPTextModelWithProjection."""
    model = resolve(str(tiny_refiner))
    other = tmp_path / "other"
    shutil.copytree(tiny_refiner / "text_encoder_2", other)
    path = other / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items()}
    path.write_text(json.dumps(config | {"architectures": ["CLIPTextModel"]}))
    assert swap(model, text_encoder=other).swapped == ("text_encoder",)


def test_another_latent_space_is_warned_of(
    tiny: Path, tiny_alpha: Path, caplog: pytest.LogCaptureFixture
) -> None:
    swap(resolve(str(tiny)), vae=tiny_alpha)
    assert "scales latents by 0.18215 and the model's own VAE by 0.13025" in caplog.text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repositories_and_revisions(
    layout: str,
    offline: Path,  # noqa: F811
    tiny: Path,
    other: Path,
    tmp_path: Path,
) -> None:
    content = tmp_path / "content"
    shutil.copytree(other / "vae", content if layout == "alone" else content / "vae")
    snapshot = put_in_cache(offline, "someone/vae", COMMIT, content)
    for place in ("someone/vae", f"someone/vae@{COMMIT}"):
        model = resolve_with(str(tiny), vae=place)
        assert model.sources["vae"].revision == COMMIT
        assert model.fetch("vae") == (snapshot if layout == "alone" else snapshot / "vae")
        assert model.public_record()["swapped"] == {"vae": "someone/vae"}


def test_short_names_stand_for_their_components(tiny: Path) -> None:
    model = resolve("demo")
    assert swap(model, text_encoder="demo").sources == model.sources
    with pytest.raises(errors.RequestError, match="--text-encoder demo does not go with"):
        resolve_with(str(tiny), text_encoder="demo")


def test_plan_takes_them(tiny: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", "a cat", "-m", str(tiny), "--device", "cpu", "--json"]
    assert cli.exit_code([*line, "--transformer", str(other)]) == 0
    assert [row["stage"] for row in json.loads(capsys.readouterr().out)["stages"]]
    assert cli.exit_code([*line, "--vae", str(tiny / "transformer")]) == errors.ModelError.exit_code
    assert "is no AutoencoderKL" in capsys.readouterr().err


def test_prepare_refuses_what_it_would_not_use(
    tiny: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["prepare", str(tiny), "--weights", "8bit", "--transformer", str(other)]
    assert cli.exit_code(line) == errors.RequestError.exit_code
    assert "--transformer has no effect with --weights 8bit" in capsys.readouterr().err
