"""No option silently does nothing: it is honoured, refused, or said in a line."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import lowvram
from lowvram import cli, errors
from lowvram.families.pixart import FAMILY
from lowvram.memory.budget import capped
from lowvram.memory.plan import Room
from lowvram.repository import resolve
from lowvram.request.denoise import resolve_denoise
from lowvram.request.run import resolve_run
from lowvram.terminal import quiet_libraries


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lowvram")


def test_a_negative_prompt_without_guidance_is_refused(tiny: Path, tmp_path: Path) -> None:
    model, picture = resolve(str(tiny)), tmp_path / "x.png"
    with pytest.raises(errors.RequestError, match=r"--negative has no effect with --guidance 1,"):
        resolve_run("a cat", model, picture, negative_prompt="blurry", guidance_scale=1)
    with pytest.raises(errors.RequestError, match="has no effect"):
        resolve_run(["a", "b"], model, picture, negative_prompt=["", "x"], guidance_scale=0)
    assert resolve_run("a cat", model, picture, negative_prompt=" ", guidance_scale=1)
    assert resolve_run("a cat", model, picture, negative_prompt="blurry", guidance_scale=1.5)


def test_a_refiner_refuses_a_negative_prompt_without_guidance(
    tiny_refiner: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    asked: dict[str, Any] = {"negative_prompt": "blue", "in_process": True}
    with pytest.raises(errors.RequestError, match=r"--negative has no effect with --guidance 1,"):
        lowvram.refine(tmp_path / "x.png", "a", str(tiny_refiner), guidance_scale=1, **asked)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_a_negative_prompt_that_denoise_cannot_use_is_said(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file may be meant for other settings too: a line, and no error."""
    path = tmp_path / "x.embeds.safetensors"
    lowvram.encode("a cat", str(tiny), output=path, negative_prompt="blurry")
    for scale, said in ((1.0, True), (2.0, False)):
        caplog.clear()
        out = tmp_path / "x.latents.safetensors"
        lowvram.denoise(path, output=out, steps=1, guidance_scale=scale)
        assert ("negative prompt has no effect" in caplog.text) == said


def test_the_encoder_does_not_follow_a_dtype_that_it_overflows_in(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = resolve_run("a cat", resolve(str(tiny)), tmp_path / "x.png", dtype="fp16")
    assert [task.dtype for task in tasks.by_stage().values()] == ["auto", "fp16", "fp16"]
    assert "the text encoder overflows in fp16" in caplog.text


@pytest.mark.parametrize("option", ["timesteps", "sigmas"])
def test_an_empty_list_is_not_the_default(option: str, tiny: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {option: []}
    with pytest.raises(errors.RequestError, match=f"{option} are empty"):
        resolve_denoise(
            "x.embeds.safetensors",
            resolve(str(tiny)),
            tmp_path / "x.latents.safetensors",
            prompts=1,
            **options,
        )


def test_seeds_beside_given_noise_are_told_what_they_are_for(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embeds = tmp_path / "x.embeds.safetensors"
    lowvram.encode("a cat", str(tiny), output=embeds)
    save_file({"latents": torch.randn(1, 4, 32, 32)}, tmp_path / "n.safetensors")
    lowvram.denoise(
        embeds,
        output=tmp_path / "x.latents.safetensors",
        steps=1,
        seed=5,
        latents=tmp_path / "n.safetensors",
    )
    assert "seeds count only for noise that steps add" in caplog.text


def test_callback_steps_need_a_callback(tiny: Path, tmp_path: Path) -> None:
    embeds = tmp_path / "x.embeds.safetensors"
    lowvram.encode("a cat", str(tiny), output=embeds)
    with pytest.raises(errors.RequestError, match="no effect without a callback"):
        lowvram.denoise(embeds, output=tmp_path / "x.latents.safetensors", callback_steps=2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--eta", "0.5"], "--eta 0.5 has no effect with DPMSolverMultistepScheduler"),
        (["--sigmas", "9,1"], "takes no explicit sigmas"),
        (["--negative", "blurry", "--guidance", "1"], "--negative has no effect"),
    ],
)
def test_a_plan_refuses_what_the_run_would(
    arguments: list[str], says: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.exit_code(["plan", "a cat", "-m", str(tiny), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_strips_say_that_they_take_one_picture_at_a_time(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["plan", "a cat", "a dog", "-m", str(tiny), "--device", "cpu", "--decode", "strips"]
    for batch, said in (("1", False), ("2", True)):
        assert cli.exit_code([*common, "--batch-size", batch]) == 0
        assert ("one picture at a time" in capsys.readouterr().out) == said


@pytest.mark.parametrize(
    ("device", "option", "said"),
    [
        ("mps", "--vram", True),
        ("xpu", "--vram", True),
        ("mps", "", False),
        ("cpu", "--vram", False),
    ],
)
def test_a_budget_that_nothing_enforces_is_said(
    device: str, option: str, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with capped(torch.device(device), Room(1 << 30, option)):
        pass
    assert (f"{option} is kept by choice of way" in caplog.text) == said


@pytest.mark.parametrize("weights", ["8bit", "4bit"])
def test_a_missing_bitsandbytes_is_one_line(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAMILY.clean("a cat", True)  # imports diffusers, which looks for bitsandbytes in its own way
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(errors.DeviceError, match=rf"^{weights} needs bitsandbytes, which is not"):
        lowvram.encode("a cat", "demo", output=tmp_path / "x.embeds.safetensors", weights=weights)


def test_8_bits_do_not_fill_the_terminal() -> None:
    """bitsandbytes warns of a cast at every product, and does what it is there for."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.NOTSET)
    quiet_libraries()
    enabled = logging.getLogger("bitsandbytes.autograd._functions").isEnabledFor(logging.WARNING)
    logger.setLevel(before)
    assert not enabled
