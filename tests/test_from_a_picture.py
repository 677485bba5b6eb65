"""`run --image`: four stages, planned and refused together; and the page that tells of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import commands
from PIL import Image
from safetensors.torch import load_file

import lowvram
from lowvram import cli, errors
from lowvram.pixels.png import read_record
from lowvram.pixels.whole import WholeDecode

PROMPT = "a large red circle on a yellow background"


def test_every_command_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands("from-a-picture.md"):
        more = ["--in-process"] if words[0] == "run" else []
        assert cli.exit_code([*words, *more]) == 0, words
    one_shot, staged = (read_record(tmp_path / f"{name}.png") for name in ("circle", "circle"))
    assert one_shot["denoise"]["strength"] == staged["denoise"]["strength"] == 0.4
    assert len(list(tmp_path.glob("between-*.png"))) == 5
    assert len(list(tmp_path.glob("walk-*.png"))) == 3
    assert len(list(tmp_path.glob("more-*.png"))) == 3


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A blue square on yellow, 200 x 200 px."""
    path = tmp_path_factory.mktemp("square") / "square.png"
    image = Image.new("RGB", (200, 200), (250, 220, 50))
    image.paste((40, 80, 220), (60, 60, 140, 140))
    image.save(path)
    return path


def test_run_equals_the_single_stages(square: Path, tmp_path: Path) -> None:
    """Each stage in a process of its own, and by hand in this one: the same latents."""
    result = lowvram.run(
        PROMPT, "demo", tmp_path / "x.png", image=square, strength=0.5, steps=6, seed=2
    )
    assert [stage["stage"] for stage in result.stages] == [
        "encode-image", "encode", "denoise", "decode",
    ]  # fmt: skip
    assert result.images[0].start == tmp_path / "x.image.latents.safetensors"
    start, embeds, latents = (
        tmp_path / f"y.{kind}.safetensors" for kind in ("start", "embeds", "latents")
    )
    lowvram.encode_image(square, "demo", output=start)
    lowvram.encode(PROMPT, "demo", output=embeds)
    lowvram.denoise(embeds, output=latents, start=start, strength=0.5, steps=6, seed=2)
    mine, theirs = (load_file(path)["latents"] for path in (latents, result.images[0].latents))
    assert torch.equal(mine, theirs)
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (128, 128)
        assert "Denoising strength: 0.5" in image.info["parameters"]
    record = read_record(tmp_path / "x.png")["denoise"]
    assert record["strength"] == 0.5 and len(record["start"]) == 64
    assert str(square) not in json.dumps(read_record(tmp_path / "x.png"))


def test_little_strength_keeps_the_picture(square: Path, tmp_path: Path) -> None:
    def distance(strength: float) -> float:
        lowvram.run(
            PROMPT,
            "demo",
            tmp_path / "x.png",
            image=square,
            strength=strength,
            seed=2,
            in_process=True,
        )
        with Image.open(tmp_path / "x.png") as made, Image.open(square) as given:
            levels = [
                torch.tensor(list(each.convert("RGB").resize((128, 128)).tobytes())).float()
                for each in (made, given)
            ]
        return float((levels[0] - levels[1]).abs().mean())

    little, much = distance(0.1), distance(0.8)
    assert little < 10 < 18 < much  # levels of 255; 5 and 23 measured, 0.8 of the VAE alone


def test_plan_lists_the_fourth_stage(square: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", PROMPT, "-m", "demo", "--image", str(square), "--vram", "2GiB"]
    assert cli.exit_code([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["stages"]
    assert [row["stage"] for row in rows] == ["encode-image", "encode", "denoise", "decode"]
    assert rows[0]["predicted"]["peak_process_bytes"] <= 2 << 30
    whole = {row["stage"]: row["predicted"]["seconds"] for row in rows}
    assert cli.exit_code([*command, "--strength", "0.1", "--json"]) == 0
    less = {
        row["stage"]: row["predicted"]["seconds"]
        for row in json.loads(capsys.readouterr().out)["stages"]
    }
    assert less["denoise"] < whole["denoise"] and less["decode"] == whole["decode"]
    assert cli.exit_code([*command, "--all", "--json"]) == 0
    ways = json.loads(capsys.readouterr().out)["stages"]
    assert {row["way"].split(",")[0] for row in ways if row["stage"] == "encode-image"} == {
        "whole", "strips",
    }  # fmt: skip
    assert len({(row["stage"], row["way"]) for row in ways}) == len(ways)


def test_plan_takes_a_picture_of_any_name(
    square: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    image = tmp_path / "x.png"
    image.write_bytes(square.read_bytes())
    assert cli.exit_code(["plan", PROMPT, "-m", "demo", "--image", str(image), "--json"]) == 0
    assert list(tmp_path.iterdir()) == [image]


def test_what_cannot_fit_is_refused_before_any_load(
    square: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram.component.use", lambda *_: pytest.fail("loaded"))
    given: dict[str, Any] = {"image": square, "decode": "whole", "vram": 5 << 20}
    with pytest.raises(errors.RequestError, match=r"encode-image with whole needs .* --vram"):
        lowvram.run(PROMPT, "demo", tmp_path / "x.png", in_process=True, **given)
    assert not list(tmp_path.iterdir())


def test_a_step_down_after_an_out_of_memory(
    square: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(WholeDecode, "encode", encode)
    result = lowvram.run(PROMPT, "demo", tmp_path / "x.png", image=square, steps=4, in_process=True)
    assert result.stages[0]["weights"] == "strips"
    assert "after whole ran out of memory" in result.stages[0]["reasons"][0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strength": 0.01}, r"0\.01 of 20 steps is less than one step: use --steps 100"),
        ({"start": "x"}, "--image and --start"),
        ({"start_picture": 0}, "--image and --start"),
        ({"image": None, "sample_seed": 1}, "name it with --image"),
        ({"image": None, "strength": 0.5}, "need --start or --image"),
        ({"image": "nothing.png"}, "nothing.png does not exist"),
        ({"size": (100, 100), "binning": False}, "100x100 is not a multiple of 16 px"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], says: str, square: Path, tmp_path: Path
) -> None:
    with pytest.raises(errors.RequestError, match=says):
        lowvram.run(
            PROMPT, "demo", tmp_path / "x.png", in_process=True, **({"image": square} | options)
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.png", "x-0.png"])
def test_the_picture_itself_is_never_overwritten(name: str, square: Path, tmp_path: Path) -> None:
    mine = tmp_path / name
    mine.write_bytes(square.read_bytes())
    with pytest.raises(errors.RequestError, match="would be overwritten"):
        lowvram.run([PROMPT] * 2, "demo", tmp_path / "x.png", image=mine, in_process=True)
    assert mine.read_bytes() == square.read_bytes()
