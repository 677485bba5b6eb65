"""Every scheduler that can be asked for by name: equal to the pipeline's, or refused with a reason.

The model under test is the tiny one, whose configuration is the published DPM-Solver++'s.
"""

import inspect
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import lowvram
from lowvram import artifacts, errors
from lowvram.repository import resolve
from lowvram.request.denoise import resolve_denoise
from lowvram.request.schedulers import NAMED, SIGMA_SPACINGS, named, scheduler_name
from lowvram.stages import schedule
from lowvram.stages.schedule import SchedulerMaker, accepts, build, own_scheduler, scheduler_maker
from lowvram.stages.trial import Schedule, _missed

SEEDS = [1, 2]
STEPS = 5
HERE = [each for each in NAMED if find_spec(NAMED[each].needs or "torch")]
MORE: dict[str, dict[str, Any]] = {
    "euler karras": {"sigma_spacing": "karras"},
    "heun exponential": {"sigma_spacing": "exponential"},
    "dpm++2m lu": {"sigma_spacing": "lu"},
    "unipc karras": {"sigma_spacing": "karras"},
    "lms karras": {"sigma_spacing": "karras"},
    "kdpm2 beta": {"sigma_spacing": "beta"},
    "euler trailing": {"spacing": "trailing"},
    "ddim leading": {"spacing": "leading", "eta": 0.3},
    "deis trailing": {"spacing": "trailing"},
}


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> Any:
    pipeline = diffusers.PixArtSigmaPipeline.from_pretrained(tiny, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def embeds(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("names") / "x.embeds.safetensors"
    lowvram.encode("a red circle", str(tiny), output=path, dtype="fp32", padding="max")
    return path


def one_shot(pipeline: Any, name: str, options: dict[str, Any], embeds: Path) -> torch.Tensor:
    """The latents of the pipeline with its scheduler swapped as its documentation says."""
    wanted, own = named(name), pipeline.scheduler
    flag = SIGMA_SPACINGS.get(options.get("sigma_spacing", ""), "")
    spacing = {"timestep_spacing": options["spacing"]} if "spacing" in options else {}
    kind = getattr(diffusers, wanted.class_name)
    unclipped = {"clip_sample": False} if wanted.class_name.startswith("DD") else {}
    settings = {**wanted.settings, **unclipped, **spacing, **({flag: True} if flag else {})}
    if "noise_sampler_seed" in accepts(kind):
        settings["noise_sampler_seed"] = SEEDS
    texts = load_file(embeds)
    given = {name: texts[f"0.{name}"][None] for name in PROMPTS}
    pipeline.scheduler = kind.from_config(own.config, **settings)
    try:
        return pipeline(
            negative_prompt=None,
            **given,
            num_images_per_prompt=2,
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            eta=options.get("eta", 0.0),
            width=128,
            height=192,
            use_resolution_binning=False,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            output_type="latent",
        ).images
    finally:
        pipeline.scheduler = own


PROMPTS = [
    f"{sign}prompt_{what}" for sign in ("", "negative_") for what in ("embeds", "attention_mask")
]


@pytest.mark.parametrize("case", [*HERE, *MORE])
def test_equals_the_pipeline(
    case: str, tiny: Path, pipeline: Any, embeds: Path, tmp_path: Path
) -> None:
    name, options = case.split()[0], MORE.get(case, {})
    if name not in HERE or ("beta" in case and not find_spec("scipy")):
        pytest.skip(f"{case} needs a package that is not here")
    latents = tmp_path / "x.latents.safetensors"
    lowvram.denoise(
        embeds,
        output=latents,
        images_per_prompt=2,
        seed=SEEDS,
        steps=STEPS,
        guidance_scale=3.0,
        batch_size=2,
        size=(128, 192),
        binning=False,
        scheduler=name,
        **options,
    )
    made = load_file(latents)["latents"]
    assert torch.equal(made, one_shot(pipeline, name, options, embeds))
    settings = artifacts.read_header(latents).settings
    assert settings["scheduler"] == NAMED[name].class_name
    for changed in NAMED[name].settings:
        assert changed in settings["scheduler_settings"]


def maker(tiny: Path, **options: Any) -> SchedulerMaker:
    model = resolve(str(tiny))
    made = resolve_denoise("x", model, "y.latents.safetensors", prompts=1, **options)
    return scheduler_maker(made, model)


@pytest.mark.parametrize("name", HERE)
def test_a_perfect_prediction_is_followed_to_the_end(name: str, tiny: Path) -> None:
    """Where a scheduler cannot, it is refused."""
    config, own = own_scheduler(resolve(str(tiny)))
    trained = Schedule.of(build(own, config, {}))
    for steps, spacing in ((1, ""), (4, ""), (10, ""), (4, "trailing")):
        try:
            made = maker(tiny, scheduler=name, steps=steps, spacing=spacing)
        except errors.RequestError as error:
            assert steps < 5, error
            continue
        assert _missed(made("cpu"), trained) < 0.07


REFUSED = {
    "no spacing": ({"scheduler": "dpm++2s", "spacing": "trailing"}, "has one spacing only"),
    "no karras": ({"scheduler": "ddim", "sigma_spacing": "karras"}, "has no such setting"),
    "nothing to leave": ({"scheduler": "euler-a", "sigma_spacing": "plain"}, "no such setting"),
    "no lu": ({"scheduler": "euler", "sigma_spacing": "lu"}, "takes karras, exponential, beta"),
    "never heeded": ({"scheduler": "lcm", "spacing": "trailing"}, "no effect on LCMScheduler:"),
    "no effect": (
        {"spacing": "leading", "sigma_spacing": "karras"},
        "no effect on DPM.* beside --karras",
    ),
    "given": ({"timesteps": [900, 5], "spacing": "leading"}, "--timesteps gives each"),
    "given sigmas": (
        {"scheduler": "euler", "sigmas": [9, 0], "sigma_spacing": "karras"},
        "--sigmas gives each",
    ),
    "no timesteps": ({"scheduler": "lcm", "sigmas": [9, 0]}, "takes no explicit sigmas"),
    "flow only": ({"scheduler": "unipc", "sigmas": [9, 0]}, "only supported when"),
    "no eta": ({"scheduler": "euler", "eta": 0.5}, "has no effect with Euler"),
    "edm": ({"scheduler": "EDMEulerScheduler"}, "is left out: it scales"),
    "unknown": ({"scheduler": "warp"}, "--scheduler warp is not known: use dpm.*euler"),
    "unknown spacing": ({"spacing": "even"}, "--spacing even is not known: use leading"),
    "no start": ({"scheduler": "euler", "steps": 1}, "start at timestep 0 of 1000"),
    "too few": ({"scheduler": "pndm", "steps": 3}, "needs 4 steps to start, not 3"),
    "astray": (
        {"scheduler": "pndm", "steps": 4, "spacing": "linspace"},
        "not arrive with these 13 calls",
    ),
    "nan": (
        {"scheduler": "kdpm2-a", "steps": 2},
        "fails with these steps .cannot convert",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_is_refused(name: str, tiny: Path) -> None:
    options, says = REFUSED[name]
    with pytest.raises(errors.RequestError, match=says):
        maker(tiny, **options)


def test_a_missing_package_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "find_spec", lambda name: None)
    for options, package in (
        ({"scheduler": "dpm++sde"}, "torchsde"),
        ({"scheduler": "lms"}, "scipy"),
        ({"sigma_spacing": "beta"}, "scipy"),
    ):
        with pytest.raises(errors.RequestError, match=f"pip install {package}"):
            maker(tiny, **options)


def test_a_model_that_can_become_nothing_else(tiny: Path, tmp_path: Path) -> None:
    from test_schedulers import with_scheduler

    folder = with_scheduler(tiny, tmp_path / "model", "LCMScheduler", {})
    assert maker(folder, scheduler="lcm", steps=4).kind is diffusers.LCMScheduler
    with pytest.raises(errors.RequestError, match="LCMScheduler cannot become Euler"):
        maker(folder, scheduler="euler")


def test_first_timesteps_that_are_equal(tiny: Path, tmp_path: Path) -> None:
    """diffusers alone begins at the second of them and runs past the end."""
    if not find_spec("scipy"):
        pytest.skip("beta needs scipy")
    made = maker(Path("demo"), sigma_spacing="beta", steps=20)
    first, second = made("cpu").timesteps[:2].tolist()
    assert first == second
    upstream = build(made.kind, made.config, made.settings)
    upstream.set_timesteps(20)
    trained = Schedule.of(upstream)
    with pytest.raises(IndexError):
        _missed(upstream, trained)
    assert _missed(made("cpu"), trained) < 1e-5


def test_predictions_are_not_clipped_to_pixels(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDIM arrives where DPM-Solver++ does; with diffusers' default it is far away."""
    for name in ("ddim", "ddpm"):
        assert maker(tiny, scheduler=name).settings == {"clip_sample": False}
    assert maker(tiny).settings == {}
    embeds, latents = tmp_path / "x.embeds.safetensors", tmp_path / "x.latents.safetensors"
    lowvram.encode("a large blue star on a yellow background", "demo", output=embeds)

    def denoised(name: str) -> torch.Tensor:
        lowvram.denoise(embeds, output=latents, scheduler=name)
        return load_file(latents)["latents"]

    own, ours = denoised(""), denoised("ddim")
    as_it_was = schedule._settings

    def clipping(*asked: Any) -> dict[str, Any]:
        return {k: v for k, v in as_it_was(*asked).items() if k != "clip_sample"}

    monkeypatch.setattr(schedule, "_settings", clipping)
    assert (ours - own).norm() < 0.05 * own.norm()
    assert (denoised("ddim") - own).norm() > 0.3 * own.norm()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("DPM++ 2M SDE", "dpm++2m-sde"),
        ("Euler a", "euler-a"),
        ("", ""),
        ("default", ""),
        ("HeunDiscreteScheduler", "HeunDiscreteScheduler"),
        ("dpm_single", "dpm++2s"),
    ],
)
def test_names_are_taken_as_people_write_them(text: str, name: str) -> None:
    assert scheduler_name(text) == name


def test_every_name_is_a_class_of_diffusers() -> None:
    for each in NAMED.values():
        assert hasattr(diffusers, each.class_name)
        if not each.needs or find_spec(each.needs):
            wanted = set(inspect.signature(getattr(diffusers, each.class_name)).parameters)
            assert set(each.settings) <= wanted


def test_a_class_is_what_diffusers_makes_of_it(tiny: Path) -> None:
    made = maker(tiny, scheduler="DPMSolverMultistepScheduler")
    assert made.settings == {}
    own = json.loads((tiny / "scheduler" / "scheduler_config.json").read_text())
    assert made("cpu").config.solver_order == own["solver_order"]
