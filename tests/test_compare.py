"""`lowvram compare`: each way against the reference, each distinct stage once, reasons as rows."""

import base64
import json
import math
import re
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import commands
from PIL import Image

import lowvram
from lowvram import cli, errors
from lowvram.compare import carrying, sheet, table
from lowvram.compare.comparison import Compared, Comparison
from lowvram.compare.differences import TextDifference, compare_texts, follow
from lowvram.compare.page import page
from lowvram.compare.variants import variants
from lowvram.demo.drawing import draw
from lowvram.demo.scenes import Scene, Thing
from lowvram.families.pixart import FAMILY
from lowvram.stages.dispatch import carry_out

PROMPTS = ["a large blue star on a yellow background", "a cat on a mat"]
VARY = {
    "encoder_weights": ["whole", "8bit", "4bit", "stream"],
    "transformer_weights": ["whole", "stream"],
    "decode": ["whole", "strips", "blended"],
}


def compare(folder: Path, vary: Any = VARY, **options: Any) -> Comparison:
    chosen: dict[str, Any] = {"steps": 2, "in_process": True, **options}
    return lowvram.compare(PROMPTS, "demo", folder, vary=vary, **chosen)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared")


@pytest.fixture(scope="module")
def found(folder: Path) -> Comparison:
    return compare(folder)


@pytest.fixture(scope="module")
def rows(found: Comparison) -> dict[str, Compared]:
    return {row.variant.name: row for row in found.rows}


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that are carried out, in order."""
    seen: list[str] = []

    def carry(stage: str, *rest: Any) -> dict[str, Any]:
        if stage not in ("measure", "check"):
            seen.append(stage)
        return carry_out(stage, *rest)

    monkeypatch.setattr(carrying, "carry_out", carry)
    return seen


def test_fewer_bits_are_further_away_and_streaming_is_not(rows: dict[str, Compared]) -> None:
    eight, four = rows["encoder 8bit"], rows["encoder 4bit"]
    assert eight.embeds and four.embeds and eight.latents and four.latents
    assert 0 < eight.embeds.error < four.embeds.error < 1
    assert 0 < eight.embeds.error_worst < four.embeds.error_worst
    assert 1 > eight.embeds.cosine > four.embeds.cosine > 0.9
    assert 0 < eight.latents.error < four.latents.error
    assert eight.pictures and four.pictures
    assert math.inf > eight.pictures.psnr > four.pictures.psnr
    stream = rows["encoder stream"]
    assert stream.embeds and stream.embeds.equal
    assert (stream.embeds.error, stream.embeds.error_worst, stream.embeds.cosine) == (0, 0, 1)
    assert (stream.latents, stream.pictures) == (None, None)  # the reference's own
    reference = rows["reference"]
    assert (reference.embeds, reference.latents, reference.pictures) == (None, None, None)


def test_decoding_changes_pixels_only(rows: dict[str, Compared]) -> None:
    for name, most in {"decode strips": 1, "decode blended": 255}.items():
        row = rows[name]
        assert (row.embeds, row.latents) == (None, None)
        assert row.pictures and row.pictures.largest <= most
    blended = rows["decode blended"].pictures
    assert blended and blended.psnr < 50 and blended.largest > 1


def test_each_distinct_stage_is_carried_out_once(rows: dict[str, Compared]) -> None:
    own = {
        name: [stage.stage for stage in row.stages if stage.of == name]
        for name, row in rows.items()
    }
    assert own == {
        "reference": ["encode", "denoise", "decode"],
        "encoder 8bit": ["encode", "denoise", "decode"],
        "encoder 4bit": ["encode", "denoise", "decode"],
        "encoder stream": ["encode"],
        "transformer stream": ["denoise"],
        "decode strips": ["decode"],
        "decode blended": ["decode"],
    }
    ways = {name: [stage.report["weights"] for stage in row.stages] for name, row in rows.items()}
    assert ways["encoder 8bit"] == ["8bit", "whole", "whole"]
    assert ways["transformer stream"] == ["whole", "stream", "whole"]
    assert ways["decode blended"] == ["whole", "whole", "blended"]


def test_every_token_is_named_and_counted_once(rows: dict[str, Compared]) -> None:
    """Both prompts and the empty negative prompt, which they share."""
    embeds = rows["encoder 4bit"].embeds
    assert embeds
    assert [text.text for text in embeds.texts] == [PROMPTS[0], "", PROMPTS[1]]
    assert embeds.texts[0].tokens[-1] == embeds.texts[1].tokens[0] == "end of text"
    assert "".join(embeds.texts[0].tokens[:-1]) == PROMPTS[0].replace(" ", "")
    errors_ = [error for text in embeds.texts for error in text.errors]
    assert embeds.error == pytest.approx(np.mean(errors_))
    assert embeds.error_worst == max(errors_)
    worst = next(text for text in embeds.texts if text.text == embeds.worst_text)
    assert worst.errors[worst.tokens.index(embeds.worst_token)] == max(errors_)


def test_the_mean_is_over_tokens_and_not_over_texts() -> None:
    short = TextDifference("a", ["a"], [0.5], [0.4])
    long = TextDifference("b c", ["b", "c", "d"], [1.0, 1.0, 0.9], [0.0, 0.0, 0.8])
    both = compare_texts([short, long])
    assert (both.error, both.cosine) == (pytest.approx(0.3), pytest.approx(0.85))
    assert (both.worst_token, both.worst_text) == ("d", "b c")
    assert (both.error_worst, both.cosine_worst, both.equal) == (0.8, 0.5, False)


def test_prompts_in_the_demos_words_are_judged(rows: dict[str, Compared], tmp_path: Path) -> None:
    following = rows["reference"].following
    assert following and (following.judged, following.pictures, following.asked) == (1, 2, 5)
    scene = Scene((Thing("star", "blue", "large"),), "yellow", "top left")
    draw(scene).save(tmp_path / "x.png")
    prompts = ["a large blue star in the top left corner, on yellow", "a red star in the centre"]
    judged = follow(prompts, [tmp_path / "x.png"] * 2)
    assert judged and (judged.asked, judged.found) == (10, 8)
    assert judged.by_attribute["colour"] == [2, 1]
    assert judged.by_attribute["size"] == [1, 1]
    assert judged.by_attribute["count"] == [2, 2]
    assert judged.by_attribute["relation"] == [0, 0]
    draw(scene).resize((64, 64)).save(tmp_path / "y.png")
    assert follow(prompts[:1], [tmp_path / "y.png"]) is None
    ring, cross = Thing("ring", "red"), Thing("cross", "green")
    draw(Scene((ring, cross), relation="above", canvas=(128, 192))).save(tmp_path / "z.png")
    judged = follow(["a red ring below a green cross"], [tmp_path / "z.png"])
    assert judged and (judged.asked, judged.found) == (4, 3)
    assert judged.by_attribute["relation"] == [1, 0]


def test_going_on_does_nothing_again(
    folder: Path, found: Comparison, stages: list[str], tmp_path: Path
) -> None:
    again = compare(folder)
    assert stages == []
    assert again.to_json() == found.to_json()


def test_going_on_does_what_is_missing_or_damaged(found: Comparison, stages: list[str],
                                                  tmp_path: Path) -> None:  # fmt: skip
    vary = {"decode": ["whole", "strips"]}
    first = compare(tmp_path, vary)
    assert stages == ["encode", "denoise", "decode", "decode"]
    files = first.rows[0].files
    assert files
    stages.clear()
    latents = Path(files["latents"])
    data = bytearray(latents.read_bytes())
    data[-1] ^= 1
    latents.write_bytes(data)
    compare(tmp_path, vary)
    assert stages == ["denoise"]
    stages.clear()
    Path(files["pictures"][1]).unlink()
    compare(tmp_path, vary)
    assert stages == ["decode"]
    stages.clear()
    compare(tmp_path, vary, steps=3)
    assert stages == ["denoise", "decode", "decode"]


def test_what_cannot_be_done_is_a_row_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAMILY.clean("a cat", True)  # imports diffusers, which looks for bitsandbytes in its own way
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    vary = {"encoder_weights": ["stream", "8bit"], "transformer_weights": ["stream", "whole"]}
    made = compare(tmp_path, vary, stage_budget=20 << 20)
    failed = {row.variant.name: row.failed for row in made.rows}
    assert failed["reference"] == ""
    assert failed["encoder 8bit"].startswith("8bit needs bitsandbytes, which is not installed")
    assert re.search(
        r"whole needs 2\d\.\d MB .*use --stage-budget 2\dMiB", failed["transformer whole"]
    )
    assert "transformer whole: denoise with whole needs" in made.table()
    document = json.loads((tmp_path / "comparison.json").read_text())
    assert [bool(each["failed"]) for each in document["variants"]] == [False, True, True]


def test_the_reference_must_work(tmp_path: Path) -> None:
    with pytest.raises(
        errors.RequestError, match=r"^reference: transformer whole is what all .*MB"
    ):
        compare(tmp_path, {"transformer_weights": ["whole", "stream"]}, stage_budget=20 << 20)


def test_a_tiny_checkpoint_and_several_dtypes(tiny: Path, tmp_path: Path) -> None:
    """Nothing is judged here."""
    made = lowvram.compare(
        "a cat",
        str(tiny),
        tmp_path,
        vary={"dtype": ["fp32", "auto"]},
        steps=1,
        seed=[3, 5],
        in_process=True,
    )
    row = made.rows[1]
    assert row.embeds and row.latents and row.pictures
    assert row.embeds.error > 0
    assert [item["seed"] for item in made.items] == [3, 5]
    assert len(row.latents.errors) == len(row.pictures.pictures) == 2
    assert row.following is None
    assert "as asked" not in made.table()


@pytest.mark.parametrize(
    ("vary", "fixed", "says"),
    [
        ({}, {}, "nothing to compare"),
        ({"decode": ["whole"]}, {}, "nothing to compare"),
        ({"decode": ["whole", "half"]}, {}, "--decode half is not known: use auto, whole"),
        ({"encoder_weights": ["whole", "8bit", "8bit"]}, {}, "names one twice"),
        ({"decode": ["whole", "strips"]}, {"decode": "whole"}, "both varied and fixed"),
    ],
)
def test_bad_lists_are_refused(vary: Any, fixed: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.RequestError, match=says):
        variants(vary, fixed)


def test_what_cannot_be_varied_is_refused() -> None:
    with pytest.raises(TypeError, match="'steps'"):
        variants({"steps": [1, 2]}, {})  # type: ignore[typeddict-unknown-key]


def test_the_table(found: Comparison) -> None:
    lines = found.table().splitlines()
    assert lines[0] == "reference: encoder whole, transformer whole, decode whole"
    assert lines[1] == "demo, 2 pictures of 128x128 px, 2 prompts, 1 seed"
    titles = lines[4].split()
    assert titles[:6] == ["cosine", "error", "latents", "PSNR", "worst", "SSIM"]
    body = {re.split(r" {2,}", line)[0]: re.split(r" {2,}", line)[1:] for line in lines[5:12]}
    assert body["encoder stream"][:6] == ["="] * 6
    assert body["decode blended"][:3] == ["="] * 3
    assert body["decode blended"][3].endswith(" dB")
    assert body["encoder 4bit"][-1].endswith(" of 5")
    assert any(line.startswith("encoder 4bit: worst token “") for line in lines)
    assert any("1 of 2 pictures not judged" in line for line in lines)
    assert any(re.match(r"decode strips +decode +strips +float32 +\d", line) for line in lines)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"), (1e-6, "1.0e-6"), (3.14e-12, "3.1e-12"), (0.00021, "0.00021"),
        (0.0123, "0.012"), (0.5, "0.5"), (12.3, "12"), (math.inf, "infinite"),
    ],
)  # fmt: skip
def test_small_numbers_are_never_zero(value: float, said: str) -> None:
    assert table.small(value) == said


@pytest.mark.parametrize(
    ("value", "said"), [(1.0, "1"), (1 - 1e-9, "1 - 1.0e-9"), (0.9991, "0.9991"), (-1.0, "-1.0000")]
)
def test_nearly_one_is_never_one(value: float, said: str) -> None:
    assert table.near_one(value) == said


def test_the_document(found: Comparison, folder: Path) -> None:
    text = (folder / "comparison.json").read_text()
    document = json.loads(text, parse_constant=pytest.fail)  # no NaN, no Infinity
    assert document == json.loads(json.dumps(found.to_json()))
    assert document["settings"]["denoise"]["steps"] == 2
    assert [each["name"] for each in document["variants"]] == [
        row.variant.name for row in found.rows
    ]
    four = document["variants"][2]
    assert four["options"] == {
        "encoder_weights": "4bit", "transformer_weights": "whole", "decode": "whole",
    }  # fmt: skip
    assert len(four["embeds"]["texts"][0]["errors"]) == len(four["embeds"]["texts"][0]["tokens"])
    assert four["stages"][0]["report"]["weights_bytes"] > 0
    strips = document["variants"][5]["pictures"]
    if strips["equal"]:
        assert strips["psnr"] is None


def test_the_sheet(found: Comparison, rows: dict[str, Compared]) -> None:
    """A 256 px cell for each 128 px picture; the map below is the difference, amplified."""
    columns, line = 7, 2 * 256 + 2 * sheet._LINE + 2 * sheet._GAP
    with Image.open(found.sheet) as opened:
        picture = opened.convert("RGB")
    left = sheet._MARGIN + sheet._SIDE
    assert picture.width == left + columns * (256 + sheet._GAP) + sheet._MARGIN
    top = sheet._MARGIN + 3 * sheet._LINE
    assert top + 2 * line < picture.height < top + 2 * line + 4 * sheet._MARGIN
    blended = rows["decode blended"]
    assert blended.files and rows["reference"].files
    shown, levels = [], []
    for column, row in ((0, rows["reference"]), (6, blended)):
        x = left + column * (256 + sheet._GAP)
        shown.append(np.asarray(picture.crop((x, top, x + 256, top + 256))))
        with Image.open(row.files["pictures"][0]) as one:  # type: ignore[index]
            levels.append(np.asarray(one.convert("RGB")))
        assert np.array_equal(shown[-1], levels[-1].repeat(2, 0).repeat(2, 1))
    below = top + 256 + sheet._LINE + sheet._GAP
    seen = np.asarray(picture.crop((x, below, x + 256, below + 256)))[::2, ::2].astype(int)
    difference = np.abs(levels[1].astype(int) - levels[0])
    factors = {f for f in (1, 2, 4, 8, 16, 32, 64, 128)
               if np.array_equal(seen, np.minimum(f * difference, 255))}  # fmt: skip
    assert factors
    white = np.asarray(picture)[: sheet._MARGIN]
    assert (white == 255).all()  # nothing is written outside of its place
    assert (np.asarray(picture)[:, -sheet._MARGIN :] == 255).all()


def test_the_page_needs_nothing_else_and_runs_nothing(found: Comparison) -> None:
    text = found.page.read_text(encoding="utf-8")
    assert re.findall(r"(?:src|href)=\"(?!data:)", text) == []
    assert "<script" not in text
    image = re.findall(r"src=\"data:image/png;base64,([^\"]+)\"", text)
    assert [base64.b64decode(each) for each in image] == [found.sheet.read_bytes()]
    for row in found.rows:
        assert f"<td>{row.variant.name}</td>" in text
    bad = replace(found, items=[{**found.items[0], "prompt": "<script>x</script>"}])
    assert "<script>" not in page(bad, b"")


@pytest.mark.parametrize(
    ("differences", "factor"), [([0, 0], 128), ([1], 128), ([2], 64), ([100], 2), ([128, 3], 1)]
)
def test_the_factor_keeps_differences_within_white(differences: list[int], factor: int) -> None:
    assert sheet.factor(np.bincount(differences, minlength=256)) == factor


def test_a_long_comparison_shows_the_worst(found: Comparison) -> None:
    class Picture:
        def __init__(self, psnr: float) -> None:
            self.psnr = psnr

    values = [float(index) for index in range(100, 0, -1)]
    differ: Any = type("D", (), {"pictures": [Picture(value) for value in values]})
    row = Compared(found.rows[1].variant, pictures=differ)
    assert sheet.which([found.rows[0], row], 100) == list(range(76, 100))
    assert sheet.which([found.rows[0]], 3) == [0, 1, 2]


def test_long_titles_are_cut_to_their_column() -> None:
    font = sheet._font("DejaVuSans")
    text = sheet._fitting("a" * 200, font, 200)
    assert text.endswith("…")
    assert font.getlength(text) <= 200


def test_the_commands_of_the_page_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (command,) = commands("compare.md")
    assert command[0] == "compare"
    code = cli.exit_code([*command, "--in-process", "--steps", "2"])
    out, err = capsys.readouterr()
    assert (code, "Traceback" in err) == (0, False)
    written = ["sheet.png", "comparison.html", "comparison.json"]
    assert out.splitlines()[:3] == [f"compared/{name}" for name in written]
    assert "reference: encoder whole, decode whole" in out
    with Image.open(BytesIO((tmp_path / "compared" / "sheet.png").read_bytes())) as opened:
        assert opened.format == "PNG"


def test_the_command_in_json_and_its_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["compare", "a red circle", "-m", "demo", "--steps", "1", "-o", str(tmp_path / "c")]
    assert cli.exit_code([*common, "--weights", "whole,4bit", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in document["variants"]] == ["reference", "encoder 4bit"]
    assert document["variants"][1]["embeds"]["error"] > 0  # measured in the worker
    common.append("--in-process")
    for arguments, says in {
        ("--weights", "whole"): "nothing to compare",
        ("--weights", "whole,,8bit"): "is not a list",
        ("--dtype", "fp32,fp8"): "--dtype fp8 is not known",
        ("--decode", "whole,strips", "--size", "9x9"): "size 9x9 is out of range",
    }.items():
        assert cli.exit_code([*common, *arguments]) == 2
        assert says in capsys.readouterr().err.splitlines()[-1]
