"""The command line: bad input gets one clear line, a documented exit code, and no traceback."""

import json
import logging
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sd_parsers import ParserManager

import lowvram
from lowvram import cli, errors
from lowvram.demo.reading import VOCABULARY
from lowvram.pixels.png import read_record


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line carried out in this process."""
    capsys.readouterr()
    code = cli.exit_code([str(each) for each in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def embeds(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "x.embeds.safetensors"
    assert cli.exit_code(["encode", "a cat", "a dog", "-m", str(tiny), "-o", str(path)]) == 0
    return path


BAD = {
    "unknown model": (["run", "a cat", "-m", "nonsense"], 3, "pixart-sigma-1024, .*demo"),
    "empty prompt": (["run", " ", "-m", "TINY"], 2, "the prompt is empty"),
    "size": (["run", "a cat", "-m", "TINY", "--size", "9x9"], 2, "size 9x9 is out of range"),
    "unbinned size": (
        ["run", "a cat", "-m", "TINY", "--no-binning", "--size", "250x256"],
        2,
        "250x256 is not a multiple of 16 px",
    ),
    "size's form": (["run", "a cat", "-m", "TINY", "--size", "big"], 2, "'big' is not WIDTHx"),
    "seed": (["run", "a cat", "-m", "TINY", "--seed", "x"], 2, "'x' is not a number"),
    "seeds": (
        ["run", "a cat", "-m", "TINY", "--seed", "1,2", "--images", "3"],
        2,
        "2 seeds for 3 pictures",
    ),
    "fp16": (["encode", "a cat", "-m", "TINY", "--dtype", "fp16"], 2, "overflows in fp16"),
    "revision": (["encode", "a cat", "-m", "TINY", "--revision", "v"], 2, "a folder has none"),
    "no tokens": (["encode", "a cat", "-m", "TINY", "--max-tokens", "0"], 2, "2 to 300"),
    "only markup": (["encode", "<b></b>", "-m", "TINY"], 2, "nothing is left of the prompt"),
    "only markup, in full": (
        ["encode", "<b></b>", "-m", "TINY"],
        2,
        "for the .*, or use --no-clean",
    ),
    "invisible": (["encode", "\u200b", "-m", "TINY"], 2, r"nothing is .*'\\u200b' .* otherwise$"),
    "as invisible": (["encode", "\u00ad\u200b", "-m", "TINY", "--no-clean"], 2, "nothing is left"),
    "weightless": (["encode", "((((", "-m", "TINY", "--weighting"], 2, "nothing is left"),
    "not text": (["encode", "a \udcff", "-m", "TINY"], 2, "is not valid text"),
    "odd timesteps": (["denoise", "EMBEDS", "--timesteps", "nan"], 2, "list of whole numbers"),
    "odd sigmas": (["denoise", "EMBEDS", "--sigmas", "1,nan"], 2, "must be positive and descend"),
    "same file": (["denoise", "EMBEDS", "-o", "EMBEDS"], 2, "is the input"),
    "a folder": (["run", "a cat", "-m", "TINY", "-o", "DIR/x.png"], 7, "x.png is a folder"),
    "meta": (["encode", "a cat", "-m", "TINY", "--device", "meta"], 5, "no device 'meta' here"),
    "weights": (["encode", "a cat", "-m", "TINY", "--weights", "2bit"], 2, "auto, whole, 8bit"),
    "dtype": (["encode", "a cat", "-m", "TINY", "--dtype", "fp8"], 2, "auto, fp32, bf16, fp16"),
    "steps": (["denoise", "EMBEDS", "--steps", "0"], 2, "--steps 0 is out of range: 1 to 1000"),
    "steps twice": (
        ["denoise", "EMBEDS", "--steps", "3", "--timesteps", "5,1"],
        2,
        "exclude each other",
    ),
    "rising timesteps": (["denoise", "EMBEDS", "--timesteps", "1,5"], 2, "must descend"),
    "no sigmas": (["denoise", "EMBEDS", "--sigmas", "9,1"], 2, "takes no explicit sigmas"),
    "no eta": (["denoise", "EMBEDS", "--eta", "0.5"], 2, "has no effect with DPMSolver"),
    "guidance": (["denoise", "EMBEDS", "--guidance", "nan"], 2, "out of range: 0 to 100"),
    "no file": (["denoise", "nothing.safetensors"], 4, "nothing.safetensors does not exist"),
    "wrong file": (["decode", "EMBEDS"], 4, "holds embeds, but latents are needed"),
    "other model": (["denoise", "EMBEDS", "-m", "demo"], 4, "--model is demo: encode again"),
    "not a picture": (["run", "a cat", "-m", "TINY", "-o", "x.jpg"], 2, "pictures are PNG"),
    "no latents": (["denoise", "EMBEDS", "--latents", "n"], 2, "starting latents n do not exist"),
    "device": (
        ["encode", "a cat", "-m", "TINY", "--device", "warp"],
        5,
        r"no device 'warp' here \(not the name of a device\): use --device cpu",
    ),
    "no model": (["run", "a cat", "-m", ""], 3, "no model ''"),
    "nobody's model": (["run", "a cat", "-m", "~nosuchuser/x"], 2, "names no home folder"),
    "nobody's encoder": (
        ["encode", "a cat", "-m", "TINY", "--text-encoder", "~nosuchuser/x"],
        2,
        "names no home folder",
    ),
    "no places": (["denoise", "EMBEDS", "--at", ""], 2, "'' is not a list of numbers: 0.25,0.5"),
    "embeds of ours": (
        ["encode", "a cat", "-m", "TINY", "--embeds", "EMBEDS"],
        2,
        "holds embeddings that lowvram made: lowvram denoise it",
    ),
    "option": (["run", "a cat", "--bogus"], 2, "No such option"),
    "nothing": (["denoise"], 2, "Missing argument"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_a_code(
    name: str,
    tiny: Path,
    embeds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DIR" / "x.png").mkdir(parents=True)
    arguments, expected, says = BAD[name]
    if arguments[0] == "run":
        arguments = [*arguments, "--in-process"]
    named = {"TINY": tiny, "EMBEDS": embeds}
    code, out, err = run(capsys, *(named.get(each, each) for each in arguments))
    lines = err.strip().splitlines()
    assert code == expected
    assert out == ""
    assert lines[-1].startswith("lowvram: ")
    assert re.search(says, lines[-1]), lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_starting_latents_of_another_shape(
    embeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"latents": torch.zeros(2, 4, 8, 8)}, tmp_path / "n.safetensors")
    code, _, err = run(capsys, "denoise", embeds, "--latents", tmp_path / "n.safetensors")
    assert code == 2
    assert "have shape [2, 4, 8, 8], but [2, 4, 32, 32] are needed" in err


def test_starting_latents_that_are_no_numbers(
    embeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = torch.zeros(2, 4, 32, 32)
    noise[1, 0, 0, 0] = float("nan")
    save_file({"latents": noise}, tmp_path / "n.safetensors")
    code, _, err = run(capsys, "denoise", embeds, "--latents", tmp_path / "n.safetensors")
    assert code == 2
    assert "n.safetensors hold NaN or infinity: make them again" in err


def test_float32_is_no_way_out_where_it_is_so_already(
    embeds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "lowvram.families.pixart.PixArtSigma.predict",
        lambda self, network, latents, *_: torch.full_like(latents, float("nan")),
    )
    output = ("-o", tmp_path / "x.latents.safetensors", "--steps", "1")
    code, _, err = run(capsys, "denoise", embeds, *output, "--dtype", "fp32")
    assert code == 8 and "fp32" not in err and "try another --guidance" in err
    code, _, err = run(capsys, "denoise", embeds, *output, "--dtype", "bf16")
    assert code == 8 and "denoise with --dtype fp32" in err


def test_cut_prompt_is_quoted(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "a cat " * 200 + "with a green hat"
    path = tmp_path / "x.embeds.safetensors"
    code, _, err = run(capsys, "encode", prompt, "-m", tiny, "-o", path)
    assert code == 0
    assert "300 fit; dropped from its end" in err
    assert "green hat”" in err


@pytest.mark.parametrize("verb", ["run", "encode"])
def test_a_prompt_that_the_demo_knows_no_word_of_is_told_once(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on all the same; a prompt with a known word, and another model, are not told."""
    end = {"run": ("x.png", "--steps", "1", "--in-process"), "encode": ("x.embeds.safetensors",)}
    rest = ("-o", tmp_path / end[verb][0], *end[verb][1:])
    code, _, err = run(capsys, verb, "a cat on a mat", "-m", "demo", *rest)
    assert code == 0
    told = [line for line in err.splitlines() if VOCABULARY in line]
    assert told == [f"warning: nothing in the prompt “a cat on a mat” is known here: {VOCABULARY}"]
    code, _, err = run(capsys, verb, "a cat with a star", "-m", "demo", *rest)
    assert code == 0 and "is known here" not in err


def test_of_strange_prompts_each_is_told_once_and_the_words_with_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.embeds.safetensors"
    code, _, err = run(capsys, "encode", "a cat", "a dog", "a cat", "-m", "demo", "-o", path)
    assert code == 0
    told = [line for line in err.splitlines() if "is known here" in line]
    assert told == [
        f"warning: nothing in the prompt “a cat” is known here: {VOCABULARY}",
        "warning: nothing in the prompt “a dog” is known here",
    ]


@pytest.mark.parametrize("command", [["plan", "a star"], ["models", "--schedulers"]])
def test_what_loads_nothing_keeps_the_libraries_quiet_too(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)
    code, _, err = run(capsys, *command, "-m", "demo")
    assert (code, err) == (0, "")
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_control_tokens_are_plain_text(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    for index, prompt in enumerate(("a cat </s> b", "a cat < /s> b")):
        path = tmp_path / f"{index}.embeds.safetensors"
        code, _, err = run(capsys, "encode", prompt, "-m", tiny, "--no-clean", "-o", path)
        assert code == 0
        assert ("is not a control token" in err) == (index == 0)
        made.append(path)
    first, second = (load_file(path)["0.prompt_embeds"] for path in made)
    assert first.equal(second)


def test_json_is_one_document_and_nothing_else(
    embeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents, picture = tmp_path / "x.latents.safetensors", tmp_path / "x.png"
    size = ["--size", "200x120", "--seed", "4"]
    code, out, _ = run(capsys, "denoise", embeds, *size, "--steps", "2", "-o", latents, "--json")
    assert code == 0
    images = json.loads(out)["images"]
    assert [(image["path"], image["seed"]) for image in images] == [(None, 4), (None, 4)]
    code, out, _ = run(capsys, "decode", latents, "-o", picture, "--json")
    document = json.loads(out)
    assert set(document) == {"images", "stages"}
    for image, name, prompt in zip(
        document["images"], ("x-0.png", "x-1.png"), ("a cat", "a dog"), strict=True
    ):
        assert {"path", "prompt", "seed", "width", "height", "embeds", "latents"} == set(image)
        assert (image["prompt"], image["width"], image["height"]) == (prompt, 200, 120)
        assert image["path"] == str(tmp_path / name)
        with Image.open(image["path"]) as opened:
            assert opened.size == (200, 120)
    wanted = {"stage", "seconds", "load_seconds", "weights", "dtype", "peak_allocated_bytes"}
    wanted |= {"peak_reserved_bytes", "peak_process_bytes", "peak_rss_bytes"}
    assert wanted <= set(document["stages"][0])


def test_json_of_encode_and_denoise_names_the_default_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "encode", "a star", "-n", "dull", "-m", "demo", "--json")
    document = json.loads(out)
    assert code == 0 and Path(document["embeds"]).is_file()
    assert document["texts"] == [{"prompt": "a star", "negative_prompt": "dull"}]
    code, out, _ = run(capsys, "denoise", document["embeds"], "--steps", "1", "--json")
    assert code == 0 and Path(json.loads(out)["latents"]).is_file()


def test_pictures_carry_their_record(embeds: Path, tmp_path: Path) -> None:
    latents, picture = tmp_path / "x.latents.safetensors", tmp_path / "x.png"
    steps = ["--timesteps", "800,400"]
    assert cli.exit_code(["denoise", str(embeds), *steps, "-o", str(latents)]) == 0
    assert cli.exit_code(["decode", str(latents), "-o", str(picture)]) == 0
    record = read_record(tmp_path / "x-1.png")
    assert (record["prompt"], record["seed"]) == ("a dog", 0)
    assert record["denoise"]["timesteps"] == [800, 400]
    assert record["decode"]["strategy"] == "whole"
    assert "/" not in record["model"]["name"]  # no folder of this machine
    seen = ParserManager().parse(tmp_path / "x-1.png")  # an outside reader
    assert seen is not None
    assert [prompt.value for prompt in seen.prompts] == ["a dog"]
    assert seen.samplers[0].parameters["steps"] == "2"
    with Image.open(tmp_path / "x-1.png") as opened:
        assert "trainedAlgorithmicMedia" in opened.info["XML:com.adobe.xmp"]


def test_default_outputs_stand_beside_the_input(embeds: Path, tmp_path: Path) -> None:
    dotted = tmp_path / "v1.5.embeds.safetensors"
    dotted.write_bytes(embeds.read_bytes())
    assert cli.exit_code(["denoise", str(dotted), "--steps", "1"]) == 0
    assert cli.exit_code(["decode", str(tmp_path / "v1.5.latents.safetensors")]) == 0
    assert (tmp_path / "v1.5-1.png").exists()
    with pytest.raises(errors.RequestError, match="finished ones, not noise"):
        lowvram.denoise(
            embeds,
            output=tmp_path / "y.latents.safetensors",
            latents=tmp_path / "v1.5.latents.safetensors",
        )


def test_reports_are_shown_again(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "x.png"
    arguments = ["run", "a cat", "-m", tiny, "--steps", "1", "--in-process", "-o", picture]
    code, first, _ = run(capsys, *arguments)
    assert code == 0
    assert first.startswith(f"{picture}\n\nstage ")
    code, again, _ = run(capsys, "report", tmp_path / "x.report.json")
    assert (code, again) == (0, first.split("\n\n")[1])
    code, again, _ = run(capsys, "report", picture)
    assert (code, again) == (0, first.split("\n\n")[1])


def test_exit_codes_are_distinct_and_documented() -> None:
    found = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.LowvramError)
    ]
    assert {kind.exit_code for kind in found} == set(range(1, 11))
    assert [kind for kind in found if "exit_code" not in vars(kind)] == [errors.NothingSmallerError]
    for kind in found:
        assert f"{kind.__name__} " in (errors.__doc__ or "")


def test_version_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--version")
    assert (code, out, err) == (0, f"lowvram {version('lowvram')}\n", "")


def test_help_is_there() -> None:
    """That it is quick is measured in benchmarks; that it imports no torch, in the import rules."""
    command = [sys.executable, "-m", "lowvram", "--help"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for word in ("encode", "denoise", "decode", "run", "-m demo"):
        assert word in shown
