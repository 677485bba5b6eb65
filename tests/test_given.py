"""Embeddings from elsewhere, as `PixArtSigmaPipeline` takes them: equal to it, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import lowvram
from lowvram import cli, errors

PROMPTS = ["one", "another"]


def tensors(count: int = 2, tokens: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    made = {}
    for prefix in ("", "negative_"):
        made[f"{prefix}prompt_embeds"] = torch.randn(count, tokens, 64, generator=generator)
        mask = torch.ones(count, tokens, dtype=torch.int64)
        mask[1:, 5:] = 0
        made[f"{prefix}prompt_attention_mask"] = mask
    return made


@pytest.fixture
def given(tmp_path: Path) -> Path:
    path = tmp_path / "given.safetensors"
    save_file(tensors(), path)
    return path


@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
@pytest.mark.parametrize("model", ["tiny", "tiny_alpha"])
def test_equals_the_pipeline(
    model: str,
    guidance_scale: float,
    given: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(model)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        negative_prompt=None,
        **tensors(),
        num_inference_steps=2,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="latent",
    ).images
    result = lowvram.run(
        PROMPTS,
        str(folder),
        tmp_path / "x.png",
        embeds=given,
        steps=2,
        guidance_scale=guidance_scale,
        seed=[1, 2],
        images_per_prompt=1,
        batch_size=2,
        in_process=True,
    )
    assert torch.equal(load_file(result.images[0].latents)["latents"], expected)
    assert [image.prompt for image in result.images] == PROMPTS
    assert result.stages[0]["weights"] == "given"


def test_by_stages_and_planned(
    given: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embeds = tmp_path / "x.embeds.safetensors"
    line = [*PROMPTS, "-m", str(tiny), "--embeds", str(given)]
    assert cli.exit_code(["encode", *line, "-o", str(embeds)]) == 0
    assert cli.exit_code(["denoise", str(embeds), "--steps", "1"]) == 0
    assert set(load_file(embeds)) == {f"{i}.{name}" for i in range(2) for name in tensors()}
    capsys.readouterr()
    assert cli.exit_code(["plan", *line, "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["stages"]
    assert [row["stage"] for row in rows] == ["denoise", "decode"]


def test_without_negative_ones_there_is_no_guidance(tiny: Path, tmp_path: Path) -> None:
    path, embeds = tmp_path / "given.safetensors", tmp_path / "x.embeds.safetensors"
    save_file({"prompt_embeds": tensors()["prompt_embeds"]}, path)
    lowvram.encode(PROMPTS, str(tiny), output=embeds, embeds=path)
    latents = tmp_path / "x.latents.safetensors"
    with pytest.raises(errors.RequestError, match="without negative ones"):
        lowvram.denoise(embeds, output=latents, steps=1)
    lowvram.denoise(embeds, output=latents, steps=1, guidance_scale=1.0)


def test_a_run_without_negative_ones_is_refused_before_anything_is_made(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "given.safetensors"
    save_file({"prompt_embeds": tensors()["prompt_embeds"]}, path)
    line = [*PROMPTS, "-m", str(tiny), "--embeds", str(path), "--device", "cpu"]
    for command in (["plan", *line], ["run", *line, "-o", str(tmp_path / "x.png")]):
        assert cli.exit_code(command) == errors.RequestError.exit_code
        assert "use --guidance 1, or give them too" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]
    assert cli.exit_code(["plan", *line, "--guidance", "1"]) == 0


def test_within_a_budget(given: Path, tiny: Path, tmp_path: Path) -> None:
    """Budgets are looked at before anything is loaded, for each row with its own embeddings."""
    lone = tmp_path / "lone.safetensors"
    save_file(tensors(1, 20), lone)
    options: Any = {"steps": 1, "vram": 1 << 30, "in_process": True}
    made = lowvram.run(PROMPTS, str(tiny), tmp_path / "x.png", embeds=given, **options)
    assert len(made.images) == 2
    rows: Any = [{"prompt": "one", "embeds": lone}, "a cat", {"prompt": "two", "embeds": lone}]
    many = lowvram.run_many(rows, str(tiny), tmp_path / "list", **options)
    assert not many.failed
    with pytest.raises(errors.RequestError, match="use --stage-budget"):
        lowvram.run(
            "one", str(tiny), tmp_path / "y.png", embeds=lone, stage_budget=1 << 20, in_process=True
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt_embeds": None}, "has no tensor prompt_embeds"),
        ({"prompt_embeds": torch.zeros(2, 9, 32)}, r"shape \[2, 9, 32\], where \[2, tokens, 64\]"),
        ({"prompt_embeds": torch.zeros(3, 9, 64)}, r"shape \[3, 9, 64\], where"),
        ({"prompt_embeds": torch.zeros(9, 64)}, r"shape \[9, 64\], where"),
        ({"negative_prompt_embeds": torch.full((2, 9, 64), torch.nan)}, "NaN or infinity"),
        ({"prompt_attention_mask": torch.zeros(2, 8)}, "prompt_attention_mask that is no"),
        ({"prompt_attention_mask": torch.full((2, 9), 2)}, "of 0 and 1"),
        ({"pooled": torch.zeros(2)}, "a tensor pooled, which nothing uses"),
    ],
)
def test_what_is_no_use_is_refused(
    change: dict[str, Any], said: str, tiny: Path, tmp_path: Path
) -> None:
    path, embeds = tmp_path / "given.safetensors", tmp_path / "x.embeds.safetensors"
    changed = {name: tensor for name, tensor in (tensors() | change).items() if tensor is not None}
    save_file(changed, path)
    with pytest.raises(errors.RequestError, match=said):
        lowvram.encode(PROMPTS, str(tiny), output=embeds, embeds=path)
    assert not embeds.exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("negative_prompt", "blurry"),
        ("weights", "whole"),
        ("clean_caption", False),
        ("padding", "max"),
        ("max_tokens", 20),
    ],
)
def test_how_to_encode_is_not_asked(
    option: str, value: Any, given: Path, tiny: Path, tmp_path: Path
) -> None:
    output = tmp_path / "x.embeds.safetensors"
    with pytest.raises(errors.RequestError, match="has no effect with --embeds"):
        lowvram.encode(PROMPTS, str(tiny), output=output, embeds=given, **{option: value})


def test_another_text_encoder_is_not_asked(given: Path, tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.embeds.safetensors"
    with pytest.raises(errors.RequestError, match="--text-encoder has no effect"):
        lowvram.encode(PROMPTS, str(tiny), output=output, embeds=given, text_encoder=tiny)


def test_other_files_are_refused(given: Path, tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.embeds.safetensors"
    with pytest.raises(errors.RequestError, match="does not exist"):
        lowvram.encode(PROMPTS, str(tiny), output=output, embeds=tmp_path / "no")
    with pytest.raises(errors.RequestError, match="is the input"):
        lowvram.encode(PROMPTS, str(tiny), output=given, embeds=given)
    lowvram.encode(PROMPTS, str(tiny), output=output, embeds=given)
    with pytest.raises(errors.RequestError, match="embeddings that lowvram made"):
        other = tmp_path / "y.embeds.safetensors"
        lowvram.encode(PROMPTS, str(tiny), output=other, embeds=output)
    given.write_bytes(b"nonsense")
    with pytest.raises(errors.RequestError, match="cannot be read"):
        lowvram.encode(PROMPTS, str(tiny), output=output, embeds=given)
