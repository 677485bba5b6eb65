"""A refiner in four stages that run alone equals diffusers' img2img pipeline, bit for bit.

torch's linear layers take another path for weights that require a gradient, as those of a pipeline
do when it is loaded (2e-6 apart on these pictures); ours never do, and the pipeline here is told.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from pages import commands
from PIL import Image
from safetensors.torch import load_file

import lowvram
from lowvram import errors
from lowvram.cli import exit_code
from lowvram.families.sdxl_refiner import FAMILY
from lowvram.pixels.png import read_record
from lowvram.repository import resolve
from lowvram.weights.layout import find_blocks
from scripts.make_checkpoint import build

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """One request, for both sides."""

    prompt: str = "A large blue star, wow!!"
    negative: str = ""
    seed: int = 0
    strength: float = 0.3
    steps: int = 10
    guidance_scale: float = 5.0
    scores: tuple[float, float] = (6.0, 2.5)


CASES = {
    "guided": Case(),
    "unguided": Case(guidance_scale=1.0, seed=3),
    "negative prompt": Case(negative="blurry", seed=7, guidance_scale=7.5),
    "strong": Case(strength=1.0, steps=3, seed=1),
    "weak": Case(strength=0.11, seed=2),
    "scores": Case(scores=(9.0, 1.0), seed=4),
}


@pytest.fixture(scope="module")
def pipeline(tiny_refiner: Path) -> Any:
    found = StableDiffusionXLImg2ImgPipeline.from_pretrained(tiny_refiner, dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    for part in (found.unet, found.vae, found.text_encoder_2):
        part.requires_grad_(False)
    return found


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, 96 x 64 px: nothing in it is smooth."""
    return noise(tmp_path_factory.mktemp("picture") / "x.png", 96, 64)


def noise(path: Path, width: int, height: int, seed: int = 0) -> Path:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)
    return path


def levels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).copy()


def one_shot(pipeline: Any, case: Case, picture: Path) -> tuple[torch.Tensor, np.ndarray]:
    made = {}
    for kind in ("latent", "pil"):
        made[kind] = pipeline(
            case.prompt,
            image=Image.open(picture),
            negative_prompt=case.negative,
            strength=case.strength,
            num_inference_steps=case.steps,
            guidance_scale=case.guidance_scale,
            aesthetic_score=case.scores[0],
            negative_aesthetic_score=case.scores[1],
            generator=torch.Generator().manual_seed(case.seed),
            output_type=kind,
        ).images
    return made["latent"], np.asarray(made["pil"][0])


def staged(model: Path, case: Case, picture: Path, output: Path, **more: Any) -> Any:
    return lowvram.refine(
        picture,
        case.prompt,
        str(model),
        output,
        negative_prompt=case.negative,
        seed=case.seed,
        strength=case.strength,
        steps=case.steps,
        guidance_scale=case.guidance_scale,
        aesthetic_scores=case.scores,
        device="cpu",
        in_process=True,
        **more,
    )


@pytest.mark.parametrize("name", CASES)
def test_equals_the_pipeline(
    name: str, pipeline: Any, tiny_refiner: Path, picture: Path, tmp_path: Path
) -> None:
    expected, expected_picture = one_shot(pipeline, CASES[name], picture)
    result = staged(tiny_refiner, CASES[name], picture, tmp_path / "y.png", dtype="fp32")
    found = load_file(result.images[0].latents)["latents"]
    assert torch.equal(found, expected) and found.std() > 0.1
    assert np.array_equal(levels_of(tmp_path / "y.png"), expected_picture)
    before = load_file(tmp_path / "y.start.latents.safetensors")["latents"]
    assert (found - before).norm() > 0.01 * before.norm()
    record = read_record(tmp_path / "y.png")
    assert record["denoise"]["strength"] == CASES[name].strength
    assert record["denoise"]["aesthetic_scores"] == list(CASES[name].scores)


def test_several_pictures_with_a_prompt_and_a_seed_each(
    pipeline: Any, tiny_refiner: Path, tmp_path: Path
) -> None:
    """Embeds are given to the pipeline, which encodes texts in one batch: 1e-6 apart."""
    pictures = [noise(tmp_path / f"{i}.png", 64, 64, i) for i in range(2)]
    prompts, seeds = ["a red circle", "two green stars on a hill"], [11, 5]
    result = lowvram.refine(
        pictures, prompts, str(tiny_refiner), tmp_path / "y.png", seed=seeds, steps=10,
        batch_size=2, device="cpu", in_process=True,
    )  # fmt: skip
    embeds = load_file(result.images[0].embeds)
    given = {
        name: torch.stack([embeds[f"{i}.{name}"] for i in range(2)])
        for name in (f"{n}{p}prompt_embeds" for n in ("", "negative_") for p in ("", "pooled_"))
    }
    expected = pipeline(
        **given,
        image=[Image.open(path) for path in pictures],
        strength=0.3,
        num_inference_steps=10,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
    assert torch.equal(load_file(result.images[0].latents)["latents"], expected)
    assert [(i.prompt, i.seed) for i in result.images] == list(zip(prompts, seeds, strict=True))


BUDGET = 5 << 18  # with AVX-512 oneDNN pads 8 channels to 16: encode-image takes 1.2 MB


def test_within_a_budget_the_same_bits(tiny_refiner: Path, picture: Path, tmp_path: Path) -> None:
    case, made = Case(negative="blurry"), {}
    for name, more in (
        ("whole", {}),
        ("stream", {"encoder_weights": "stream", "transformer_weights": "stream"}),
        ("budget", {"stage_budget": BUDGET, "encode": "whole", "decode": "strips"}),
    ):
        made[name] = staged(tiny_refiner, case, picture, tmp_path / f"{name}.png", **more)
    assert made["budget"].stages[2]["weights"] == "stream"
    assert [made["stream"].stages[i]["weights"] for i in (1, 2)] == ["stream"] * 2
    for stage in made["budget"].stages[:3]:
        assert stage["peak_allocated_bytes"] <= 1.01 * stage["predicted"]["peak_allocated_bytes"]
        assert stage["peak_allocated_bytes"] <= BUDGET
    for name in ("stream", "budget"):
        for each in ("embeds", "latents"):
            one, other = (load_file(getattr(made[m].images[0], each)) for m in ("whole", name))
            assert all(torch.equal(one[key], other[key]) for key in one), (name, each)


@pytest.mark.parametrize("size", [(97, 61), (64, 71)], ids=str)
def test_any_size_is_kept_and_nothing_is_scaled(
    size: tuple[int, int], tiny_refiner: Path, tmp_path: Path
) -> None:
    """What is no multiple of 8 px is as if its right and lower edge were repeated, and cut off."""
    path = noise(tmp_path / "x.png", *size)
    result = staged(tiny_refiner, Case(), path, tmp_path / "y.png")
    width, height = (-(-side // 8) * 8 for side in size)
    wide = np.pad(
        levels_of(path), ((0, height - size[1]), (0, width - size[0]), (0, 0)), mode="edge"
    )
    Image.fromarray(wide).save(tmp_path / "wide.png")
    staged(tiny_refiner, Case(), tmp_path / "wide.png", tmp_path / "z.png")
    refined = levels_of(tmp_path / "y.png")
    assert (result.images[0].width, result.images[0].height) == size
    assert refined.shape == (size[1], size[0], 3)
    difference = refined.astype(int) - levels_of(tmp_path / "z.png")[: size[1], : size[0]]
    assert np.abs(difference).max() <= 1  # of rounding: the layout in memory differs


def test_a_run_with_a_refiner(
    tiny_refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "a red circle on a green background", "-m", "demo", "--images", "2"]
    command += ["-o", str(tmp_path / "x.png"), "--steps", "3", "--seed", "5", "--device", "cpu"]
    refine = ["--refine", "--refiner", str(tiny_refiner), "--refine-strength", "0.1", "--json"]
    assert exit_code([*command, *refine]) == 0
    document = json.loads(capsys.readouterr().out)
    stages = ["encode", "denoise", "decode"]
    names = [*stages, "encode-image", "encode", "denoise", "decode"]
    expected = stages + [f"refine: {name}" for name in names[3:]]
    assert [each["stage"] for each in document["stages"]] == expected
    assert json.loads((tmp_path / "x.report.json").read_text()) == document
    assert [Path(i["path"]).name for i in document["images"]] == ["x-0.png", "x-1.png"]
    assert [Path(i["unrefined"]).name for i in document["images"]] == [
        "x-unrefined-0.png",
        "x-unrefined-1.png",
    ]
    assert exit_code([*command[:-2], "--in-process", "-o", str(tmp_path / "plain.png")]) == 0
    for index, image in enumerate(document["images"]):
        plain = levels_of(tmp_path / f"plain-{index}.png")
        assert np.array_equal(levels_of(Path(image["unrefined"])), plain)
        alone = lowvram.refine(
            image["unrefined"], image["prompt"], str(tiny_refiner), tmp_path / f"a{index}.png",
            seed=image["seed"], strength=0.1, device="cpu", in_process=True,
        )  # fmt: skip
        assert np.array_equal(levels_of(alone.images[0].path), levels_of(Path(image["path"])))
        assert not np.array_equal(levels_of(Path(image["path"])), plain)


def test_what_is_said_of_a_size_is_said_once(
    tiny_refiner: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run with a refiner is resolved once, with its picture to start from."""
    lowvram.run(
        "a red circle", "demo", tmp_path / "x.png", steps=3, size=(160, 160), binning=False,
        device="cpu", in_process=True, refine=True, refiner=str(tiny_refiner), refine_strength=0.1,
        image=noise(tmp_path / "y.png", 64, 64),
    )  # fmt: skip
    said = [each.message for each in caplog.records if "160x160 is more" in each.message]
    assert len(said) == len(set(said)) == 1


def test_a_callback_hears_the_run_and_not_its_refiner(tiny_refiner: Path, tmp_path: Path) -> None:
    heard: list[int] = []
    lowvram.run(
        "a red circle", "demo", tmp_path / "x.png", steps=2, device="cpu", in_process=True,
        callback=lambda step, timestep, latents: heard.append(step),
        refine=True, refiner=str(tiny_refiner), refine_strength=0.1,
    )  # fmt: skip
    assert heard == [0, 1]


def test_a_plan_lists_the_refiner(tiny_refiner: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "a red circle", "-m", "demo", "--device", "cpu", "--json"]
    command += ["--refine", "--refiner", str(tiny_refiner)]
    assert exit_code(command) == 0
    rows = json.loads(capsys.readouterr().out)["stages"]
    assert [row["stage"] for row in rows][3:] == [
        "refine: encode-image",
        "refine: encode",
        "refine: denoise",
        "refine: decode",
    ]
    assert all(row["chosen"] for row in rows)


def test_a_budget_that_is_too_small_is_refused_before_anything_is_made(
    tiny_refiner: Path, tmp_path: Path
) -> None:
    path = noise(tmp_path / "x.png", 1600, 1600)
    with pytest.raises(errors.RequestError, match=r"encode-image with strips .*--stage-budget \d"):
        staged(tiny_refiner, Case(), path, tmp_path / "y.png", stage_budget=8 << 20)
    assert list(tmp_path.iterdir()) == [path]


REFUSED = {
    "no picture to start from": (["run", "a cat"], "lowvram refine x.png PROMPT"),
    "strength": (["refine", "x.png", "a cat", "--strength", "0"], "--strength 0.*out of range"),
    "too few steps": (
        ["refine", "x.png", "a cat", "--steps", "2"],
        "less than one step.*--steps 4",
    ),
    "aesthetic": (["refine", "x.png", "a cat", "--aesthetic", "11,2"], "two numbers from 0 to 10"),
    "padding": (["encode", "a cat", "--padding", "none"], "--padding none is not for sdxl-refiner"),
    "cleaning": (["encode", "a cat", "--clean"], "--clean has no meaning for sdxl-refiner"),
    "T5's embeddings": (
        ["encode", "a cat", "--embeds", "x.png"],
        "--embeds is not for sdxl-refiner, whose texts are prompt_embeds and pooled_prompt_embeds",
    ),
    "over itself": (["refine", "x.png", "a cat", "-o", "x.png"], "x.png would be overwritten"),
    "nothing there": (["refine", "no.png", "a cat"], "no.png does not exist"),
    "fp16 of its VAE": (["decode", "y.latents.safetensors", "--dtype", "fp16"], "force_upcast"),
}


@pytest.fixture
def files(
    tiny_refiner: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.png").write_bytes(picture.read_bytes())
    yield tmp_path


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(
    name: str, files: Path, tiny_refiner: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, message = REFUSED[name]
    if command[0] == "decode":
        staged(tiny_refiner, Case(), files / "x.png", files / "y.png")
    if command[0] != "decode":
        command = [*command, "-m", str(tiny_refiner)]
    assert exit_code([*command, "--device", "cpu"]) == errors.RequestError.exit_code
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["refine", "x.png", "a cat", "-m", "demo"], "demo is no refiner: use -m sdxl-refiner"),
        (["run", "a cat", "-m", "demo", "--refiner", "x"], "need --refine"),
        (["run", "a cat", "-m", "demo", "--refine-strength", "0.2"], "need --refine"),
        (["run", "a cat", "-m", "demo", "--refine", "--refiner", "demo"], "demo is no refiner"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_other_models_are_no_refiners(
    command: list[str], message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(command) == errors.RequestError.exit_code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("strength", ["2", "0.001", "nan"])
def test_the_strength_after_a_run_goes_by_its_own_name(
    strength: str, tiny_refiner: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "a cat", "-m", "demo", "--refine", "--refiner", str(tiny_refiner)]
    assert exit_code([*command, "--refine-strength", strength]) == errors.RequestError.exit_code
    said = f"--refine-strength {strength} is out of range: 0.02 to 1"
    assert said in capsys.readouterr().err


def test_pixart_has_no_aesthetic_score(tmp_path: Path) -> None:
    with pytest.raises(errors.RequestError, match="--aesthetic has no meaning for pixart-sigma"):
        lowvram.run("a cat", "demo", tmp_path / "x.png", aesthetic_scores=(6, 2))


def test_pictures_of_two_sizes_are_refused(tiny_refiner: Path, tmp_path: Path) -> None:
    pictures = [noise(tmp_path / "a.png", 64, 64), noise(tmp_path / "b.png", 72, 64)]
    with pytest.raises(errors.RequestError, match=r"different sizes \(64x64, 72x64\)"):
        lowvram.refine(pictures, "a cat", str(tiny_refiner), tmp_path / "y.png")


def test_pictures_are_not_written_over(
    tiny_refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [noise(tmp_path / f"a-{index}.png", 64, 64) for index in range(2)]
    with pytest.raises(errors.RequestError, match=r"a-0.png would be .*name another picture"):
        lowvram.refine(pictures, "a cat", str(tiny_refiner), tmp_path / "a.png")
    with pytest.raises(errors.RequestError, match="no picture to refine"):
        lowvram.refine([], "a cat", str(tiny_refiner), tmp_path / "a.png")
    command = ["run", "a cat", "-m", "demo", "--image", str(pictures[0]), "-o", str(pictures[0])]
    command += ["--refine", "--refiner", str(tiny_refiner), "--in-process"]
    assert exit_code(command) == errors.RequestError.exit_code
    assert "a-0.png would be overwritten" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == pictures


def test_the_base_model_is_not_taken_for_the_refiner(tiny_refiner: Path, tmp_path: Path) -> None:
    listed = json.loads((tiny_refiner / "model_index.json").read_text())
    listed["text_encoder"] = ["transformers", "CLIPTextModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(listed))
    with pytest.raises(errors.ModelError, match="has a text_encoder, which sdxl-refiner has not"):
        resolve(str(tmp_path))


def test_published_sizes_are_the_true_ones() -> None:
    networks = {
        role: build(FAMILY.component(role), FAMILY.published_configs[role])
        for role in ("text_encoder", "transformer")
    }
    counts = {r: sum(p.numel() for p in n.parameters()) for r, n in networks.items()}
    assert counts == {"text_encoder": 694_659_840, "transformer": 2_259_526_660}
    unet = networks["transformer"]
    blocks = find_blocks(unet, FAMILY.component("transformer").blocks)
    inside = [sum(p.numel() for p in block.parameters()) for block in blocks]
    assert sum(inside) > 0.999 * counts["transformer"] and max(inside) < 75e6


@pytest.mark.parametrize("command", commands("refine.md"), ids=lambda command: command[0])
def test_the_commands_of_the_page(command: list[str], files: Path, tiny_refiner: Path) -> None:
    (files / "x.png").rename(files / "cactus.png")
    words = [word.replace("sdxl-refiner", str(tiny_refiner)) for word in command]
    if words[0] in ("run", "refine"):
        words += ["--in-process"]  # processes of their own have a test above
    if words[0] == "run":
        words += ["-m", "demo", "--steps", "3"]
    if words[0] in ("run", "plan"):
        words += ["--refiner", str(tiny_refiner)] if "--refiner" not in words else []
    if words[0] == "plan":
        words += ["-m", "demo"]
    if words[0] == "refine" and "-m" not in words:
        words += ["-m", str(tiny_refiner)]
    assert exit_code([*words, "--device", "cpu"]) == 0
