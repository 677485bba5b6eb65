"""`lowvram models` says what there is, and keeps its word."""

import json
from pathlib import Path

import pytest

from lowvram import cli, errors
from lowvram.families import all_families
from lowvram.repository import resolve
from lowvram.request.denoise import resolve_denoise
from lowvram.request.schedulers import NAMED, REFUSED
from lowvram.stages.schedule import scheduler_maker


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.exit_code(["models", *arguments]) == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """LCM has much to say of timesteps that it was not distilled on."""
    caplog.set_level("ERROR", "diffusers")


def test_every_model_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    text = listed(capsys)
    rows = {each["name"]: each for each in json.loads(listed(capsys, "--json"))["models"]}
    names = [name for family in all_families().values() for name in family.models]
    assert list(rows) == names
    assert all(name in text for name in names)
    demo = rows["demo"]
    assert (demo["size"], demo["steps"], demo["guidance_scale"]) == ("128x128", 20, 2.0)
    assert demo["where"] == "bundled"
    for name in names:  # what a short name ends in is what the table says
        for px in ("256", "512", "1024"):
            if f"-{px}" in name:
                assert rows[name]["size"] == f"{px}x{px}", name


def test_schedulers_take_what_is_listed(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each option of each scheduler is tried, and refused where the list says so."""
    arguments = ["--schedulers", "-m", str(tiny)]
    rows = json.loads(listed(capsys, *arguments, "--json"))["schedulers"]
    assert [row["name"] for row in rows] == ["default", *NAMED, *REFUSED]
    model = resolve(str(tiny))
    for row in rows:
        if row["refused"]:
            continue
        every = ("karras", "lu")
        tries = {
            "spacing": {"spacing": "trailing", "steps": 10},
            "timesteps": {"timesteps": [900, 500, 100]},
            "sigmas": {"sigmas": [9.0, 3.0, 0.0]},
            "eta": {"eta": 0.5, "steps": 10},
            **{each: {"sigma_spacing": each, "steps": 10} for each in every},
        }
        for name, options in tries.items():
            expected = row[name] if name in row else name in row["sigma_spacings"]
            task = resolve_denoise(
                "x",
                model,
                "y.latents.safetensors",
                prompts=1,
                scheduler=row["name"],
                **options,
            )
            try:
                made = scheduler_maker(task, model)
            except errors.RequestError as error:
                assert not expected, (row["name"], name, error)
            else:
                assert expected, (row["name"], name)
                assert made("cpu").order == row["order"]


def test_what_the_model_sets_and_a_scheduler_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    text = listed(capsys, "--schedulers", "-m", "demo")
    assert all(name in text for name in (*NAMED, *REFUSED))
    line = next(each for each in text.splitlines() if each.startswith("without the model's"))
    assert "rescale_betas_zero_snr: " in line
    assert "heun" in line and "unipc" not in line.split(": ")[1].split(", ")


def test_a_model_is_for_its_schedulers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.exit_code(["models", "-m", "demo"]) == 2
    assert "-m demo is for --schedulers" in capsys.readouterr().err
