"""Denoising from a picture, from earlier latents, and between two seeds."""

import inspect
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowvram
from lowvram import artifacts, errors
from lowvram.repository import Model, resolve
from lowvram.request.denoise import resolve_denoise
from lowvram.request.start import check_strength, steps_done
from lowvram.stages.interpolate import slerp
from lowvram.stages.starts import begin
from scripts.make_checkpoint import make_checkpoint
from tests.test_encode_image import noisy
from tests.test_schedulers import with_scheduler

PROMPTS = ["a red circle", "two green stars on a blue background"]
STEPS = 6
# Every scheduler of diffusers that has add_noise and denoises these latents, with what sets apart
# the kinds of one class.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++ karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++ sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++ singlestep": ("DPMSolverSinglestepScheduler", {"final_sigmas_type": "sigma_min"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}


@pytest.fixture(scope="module")
def embeds(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "x.embeds.safetensors"
    lowvram.encode(PROMPTS, str(tiny), output=path, dtype="fp32")
    return path


@pytest.fixture(scope="module")
def start(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of two pictures, 128 x 96 px, with noise of their own in them."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in "ab":
        noisy(128, 96).rotate(180 if name == "b" else 0).save(folder / f"{name}.png")
    path = folder / "x.latents.safetensors"
    lowvram.encode_image(
        [folder / "a.png", folder / "b.png"],
        str(tiny),
        output=path,
        size=(128, 96),
        binning=False,
    )
    return path


@torch.no_grad()
def reference(
    folder: Path, embeds: Path, origin: Tensor, noise: Tensor, seed: int, strength: float
) -> Tensor:
    """What `StableDiffusionXLImg2ImgPipeline` does, with PixArt's transformer: no guidance."""
    scheduler = diffusers.DiffusionPipeline.load_config(folder)["scheduler"][1]
    scheduler = getattr(diffusers, scheduler).from_pretrained(folder, subfolder="scheduler")
    transformer = PixArtTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    text = load_file(embeds)
    scheduler.set_timesteps(STEPS)
    t_start = max(STEPS - min(int(STEPS * strength), STEPS), 0)
    timesteps = scheduler.timesteps[t_start * scheduler.order :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(t_start * scheduler.order)
    generator = torch.Generator().manual_seed(seed)
    assert torch.equal(noise, torch.randn(noise.shape, generator=generator))
    latents = scheduler.add_noise(origin, noise, timesteps[:1].repeat(len(origin)))
    takes = inspect.signature(scheduler.step).parameters
    extra = {k: v for k, v in {"generator": generator, "eta": 0.0}.items() if k in takes}
    for t in timesteps:
        scaled = scheduler.scale_model_input(latents, t)
        predicted = transformer(
            scaled,
            encoder_hidden_states=text["0.prompt_embeds"][None],
            encoder_attention_mask=text["0.prompt_attention_mask"][None],
            timestep=t.reshape(1).expand(1),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0].chunk(2, dim=1)[0]
        latents = scheduler.step(predicted, t, latents, **extra, return_dict=False)[0]
    return latents


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # numpy on two of diffusers' schedulers
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(
    kind: str, tiny: Path, embeds: Path, start: Path, tmp_path: Path
) -> None:
    """Bit for bit, at a strength of some steps and at that of all."""
    name, settings = KINDS[kind]
    folder = with_scheduler(tiny, tmp_path / "model", name, settings)
    mine = tmp_path / "x.embeds.safetensors"
    lowvram.encode(PROMPTS[0], str(folder), output=mine, dtype="fp32")
    origin = load_file(start)["latents"][1:2]
    noise = torch.randn(origin.shape, generator=torch.Generator().manual_seed(5))
    for strength in (0.5, 1.0):
        output = tmp_path / "x.latents.safetensors"
        lowvram.denoise(
            mine,
            output=output,
            start=start,
            start_picture=1,
            strength=strength,
            steps=STEPS,
            seed=5,
            guidance_scale=1.0,
        )
        expected = reference(folder, mine, origin, noise, 5, strength)
        assert torch.equal(load_file(output)["latents"], expected)
        assert expected.isfinite().all()


def test_the_scheduler_is_told_where_it_begins(embeds: Path, start: Path, tmp_path: Path) -> None:
    """By its index: a timestep may be there twice, and looking it up would find another one."""
    model = resolve(artifacts.read_header(embeds).model["name"])
    output = tmp_path / "x.latents.safetensors"
    task = resolve_denoise(
        embeds, model, output, prompts=2, start=start, start_picture=0, strength=0.5, steps=6
    )
    for scheduler in (diffusers.EulerDiscreteScheduler(), diffusers.HeunDiscreteScheduler()):
        scheduler.set_timesteps(6)
        assert len(begin(task, scheduler)) == len(scheduler.timesteps) - 3 * scheduler.order
        assert scheduler.begin_index == 3 * scheduler.order


def denoised(embeds: Path, output: Path, **options: Any) -> Tensor:
    defaults = {"steps": STEPS, "guidance_scale": 2.0}
    lowvram.denoise(embeds, output=output, **(defaults | options))
    return load_file(output)["latents"]


def test_size_and_pictures_come_from_the_start(embeds: Path, start: Path, tmp_path: Path) -> None:
    """Two prompts, two pictures: each its own; in any batch size; and one of them for both."""
    output = tmp_path / "x.latents.safetensors"
    both = denoised(embeds, output, start=start, strength=0.5, seed=[1, 2], images_per_prompt=1)
    header = artifacts.read_header(output)
    assert header.settings["requested"] == header.settings["rendered"] == [128, 96]
    assert header.settings["strength"] == 0.5 and header.settings["start_picture"] == -1
    assert header.settings["start"] == artifacts.read_header(start).key
    together = denoised(
        embeds, output, start=start, strength=0.5, seed=[1, 2], images_per_prompt=1, batch_size=2
    )
    assert (both - together).abs().max() <= 1e-5 * both.abs().max()
    second = denoised(
        embeds, output, start=start, strength=0.5, seed=[1, 2], images_per_prompt=1, start_picture=1
    )
    assert torch.equal(second[1], both[1]) and not torch.equal(second[0], both[0])


def test_little_strength_changes_little(embeds: Path, start: Path, tmp_path: Path) -> None:
    origin = load_file(start)["latents"]
    output = tmp_path / "x.latents.safetensors"
    away = [
        float((denoised(embeds, output, start=start, strength=s, steps=20) - origin).norm())
        for s in (0.05, 0.3, 0.9)
    ]
    assert 0 < away[0] < away[1] < away[2]


def test_given_noise_is_what_is_added(embeds: Path, start: Path, tmp_path: Path) -> None:
    noise = torch.cat(
        [torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(s)) for s in (3, 4)]
    )
    save_file({"latents": noise}, tmp_path / "noise.safetensors")
    output = tmp_path / "x.latents.safetensors"
    given = denoised(embeds, output, start=start, latents=tmp_path / "noise.safetensors")
    assert torch.equal(
        given, denoised(embeds, output, start=start, seed=[3, 4], images_per_prompt=1)
    )


def test_variations_of_what_denoise_made(embeds: Path, tmp_path: Path) -> None:
    first = tmp_path / "first.latents.safetensors"
    size = {"size": (160, 128), "binning": False}
    made = denoised(embeds, first, **size)
    with pytest.raises(errors.RequestError, match=r"finished ones, not noise: .*--start"):
        denoised(embeds, tmp_path / "x.latents.safetensors", latents=first, **size)
    again = denoised(
        embeds,
        tmp_path / "x.latents.safetensors",
        start=first,
        start_picture=0,
        strength=0.4,
        seed=[5, 6, 7],
        steps=20,
    )
    assert again.shape == (6, *made.shape[1:])
    assert len({tensor.numpy().tobytes() for tensor in again}) == 6


def test_steps_are_counted(embeds: Path, start: Path, tmp_path: Path) -> None:
    """Those that are done, from 0, by the callback and by progress."""
    told: list[int] = []
    shown: list[tuple[int, int]] = []
    output = tmp_path / "x.latents.safetensors"
    lowvram.denoise(
        embeds,
        output=output,
        start=start,
        strength=0.5,
        steps=8,
        callback=lambda step, timestep, latents: told.append(step),
        on_progress=lambda progress: shown.append((progress.done, progress.total)),
    )
    assert told == [0, 1, 2, 3] * 2
    assert shown[-1] == (8, 8)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strength": 0}, r"--strength 0 is out of range: more than 0, up to 1"),
        ({"strength": 1.01}, "out of range"),
        ({"strength": float("nan")}, "out of range"),
        ({"strength": 0.1, "steps": 6}, r"0\.1 of 6 steps .*--steps 10, or --strength 0\.167"),
        ({"strength": 0.4, "timesteps": [900, 10]}, r"of 2 steps .*--steps 3, or --strength 0\.5"),
        ({"strength": 0.0001}, r"less than one step: use --strength"),
        ({"start_picture": 2}, r"--start-picture 2: .* holds 2, use 0 to 1"),
        ({"images_per_prompt": 2}, r"holds 2 pictures and 4 are to be made: .*--start-picture 0"),
        ({"size": (256, 256)}, r"of 128x96 px, but 256x256 px .*--size 256x256: leave --size out"),
        ({"start": None, "strength": 0.5}, "need --start or --image"),
        ({"start": None, "start_picture": 0}, "need --start or --image"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], says: str, embeds: Path, start: Path, tmp_path: Path
) -> None:
    output = tmp_path / "x.latents.safetensors"
    if not options.keys() & {"steps", "timesteps"}:
        options = {**options, "steps": STEPS}
    with pytest.raises(errors.RequestError, match=says):
        lowvram.denoise(embeds, output=output, **({"start": start} | options))
    assert list(tmp_path.iterdir()) == []


def test_the_least_strength_that_is_named_works() -> None:
    for steps in range(1, 1001):
        with pytest.raises(errors.RequestError) as refused:
            check_strength(0.0005, steps)
        least = float(str(refused.value).rpartition("--strength ")[2])
        assert steps_done(steps, least) == 1
    assert steps_done(100, 0.29) == 29  # diffusers does 28
    assert all(steps_done(n, 1.0) == n and steps_done(n, 0.5) == n // 2 for n in range(1, 1001))


def test_another_vae_is_refused_and_a_copy_is_not(
    tiny: Path, embeds: Path, start: Path, tmp_path: Path
) -> None:
    output = tmp_path / "x.latents.safetensors"
    other = tmp_path / "demo.latents.safetensors"
    header, tensors = artifacts.read(start, "latents")
    artifacts.write(other, replace(header, model=resolve("demo").record()), tensors)
    with pytest.raises(errors.RequestError, match=r"VAE of demo, which is not that of .*-m "):
        denoised(embeds, output, start=other)
    copied = shutil.copytree(tiny, tmp_path / "copy")
    assert denoised(embeds, output, start=start, model=None).shape[0] == 2
    mine = tmp_path / "x.embeds.safetensors"
    lowvram.encode(PROMPTS, str(copied), output=mine, dtype="fp32")
    assert torch.equal(denoised(mine, output, start=start), denoised(embeds, output, start=start))


def test_a_swapped_vae_in_single_stages(tiny: Path, embeds: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    make_checkpoint(tmp_path / "made", components=["vae"], seed=1)
    shutil.copytree(tmp_path / "made" / "vae", other / "vae", dirs_exist_ok=True)
    image, start = tmp_path / "x.png", tmp_path / "x.image.latents.safetensors"
    Image.new("RGB", (64, 64), "orange").save(image)
    lowvram.encode_image(image, str(tiny), output=start, vae=other)
    output = tmp_path / "x.latents.safetensors"
    with pytest.raises(errors.RequestError, match=f"give --vae {other}, or encode the picture"):
        denoised(embeds, output, start=start)
    denoised(embeds, output, start=start, vae=other)
    assert Model.from_record(artifacts.read_header(output).model).swapped == ("vae",)
    own = tmp_path / "own.image.latents.safetensors"
    lowvram.encode_image(image, str(tiny), output=own)
    with pytest.raises(errors.RequestError, match=f"give --vae {tiny}, .* --vae {other}"):
        denoised(embeds, output, start=own, vae=other)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "IPNDMScheduler"])
def test_a_scheduler_that_adds_no_noise_is_refused_before_any_load(
    name: str, tiny: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_scheduler(tiny, tmp_path / "model", name, {})
    monkeypatch.setattr("lowvram.component.use", lambda *_: pytest.fail("loaded"))
    with pytest.raises(errors.RequestError, match=f"{name} cannot add noise"):
        lowvram.run(
            "a cat",
            str(folder),
            tmp_path / "x.png",
            start=start,
            start_picture=0,
            in_process=True,
        )
    assert not list(tmp_path.glob("x.*"))


def test_between_two_seeds(embeds: Path, tmp_path: Path) -> None:
    """The ends are bit for bit those of the seeds, and nearer is nearer."""
    output, size = tmp_path / "x.latents.safetensors", {"size": (64, 64), "binning": False}
    places = [0, 0.1, 0.5, 0.9, 1]
    found = denoised(embeds, output, seed=7, towards=9, at=places, **size)
    items = artifacts.read_header(output).items
    assert [(item["seed"], item["towards"], item["at"]) for item in items[:5]] == [
        (7, 9, each) for each in places
    ]
    ends = denoised(embeds, output, seed=[7, 9], **size)
    for prompt in range(2):
        first, last = ends[2 * prompt : 2 * prompt + 2]
        own = found[5 * prompt : 5 * prompt + 5]
        assert torch.equal(own[0], first) and torch.equal(own[4], last)
        away = [float((each - first).norm()) for each in own]
        assert away == sorted(away)


def test_between_two_seeds_with_noise_in_each_step(tiny: Path, tmp_path: Path) -> None:
    """The noise that steps draw is of the nearer seed, so that the ends are exact here, too."""
    folder = with_scheduler(tiny, tmp_path / "model", "EulerAncestralDiscreteScheduler", {})
    embeds, output = tmp_path / "x.embeds.safetensors", tmp_path / "x.latents.safetensors"
    lowvram.encode(PROMPTS[0], str(folder), output=embeds, dtype="fp32")
    size = {"size": (64, 64), "binning": False}
    found = denoised(embeds, output, seed=7, towards=9, at=[0, 1], **size)
    assert torch.equal(found, denoised(embeds, output, seed=[7, 9], **size))


def test_slerp_keeps_unit_variance() -> None:
    one, other = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    for place in (0.0, 0.2, 0.5, 0.7, 1.0):
        found = slerp(one, other, place)
        assert abs(found.std() - 1) < 0.02 and abs(found.mean()) < 0.02
    assert torch.equal(slerp(one, other, 0.0), one) and torch.equal(slerp(one, other, 1.0), other)
    assert torch.equal(slerp(one, other, 0.3), slerp(other, one, 0.7))
    assert torch.allclose(slerp(one, one, 0.4), one)
    assert torch.lerp(one, other, 0.5).std() < 0.8  # what a straight line would do


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"at": [0.5]}, "--at is between two seeds: name the second one with --towards"),
        ({"towards": 9, "at": []}, "--at : give 1 to 1000 numbers from 0 to 1"),
        ({"towards": 9, "at": [0.5, 1.5]}, "--at 0.5, 1.5: give"),
        ({"towards": 9, "at": [float("nan")]}, "--at nan: give"),
        ({"towards": 9, "seed": [1, 2]}, "give --seed one number"),
        ({"towards": 9, "images_per_prompt": 2}, "--images 2 for 5 places"),
        ({"towards": -1}, "--towards -1 is out of range"),
        ({"towards": 9, "latents": "x"}, "give one of them"),
    ],
    ids=str,
)
def test_odd_seeds_are_refused(
    options: dict[str, Any], says: str, embeds: Path, tmp_path: Path
) -> None:
    with pytest.raises(errors.RequestError, match=says):
        lowvram.denoise(embeds, output=tmp_path / "x.latents.safetensors", **options)
