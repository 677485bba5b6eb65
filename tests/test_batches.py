"""Lists of prompts: one load a stage, the pictures of lone runs, and rows that fail alone."""

import inspect
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from safetensors.torch import load_file, save
from test_plan import pixels, runs_out

import lowvram
from lowvram import batch, cli, component, errors
from lowvram.cli import run as commands
from lowvram.cli.rows import fields_of, read_lines, to_listed
from lowvram.cli.words import option_name
from lowvram.pixels.whole import WholeDecode
from lowvram.request.run import RunOptions
from lowvram.rows import REFINING, SHARED, Listed, _merged
from lowvram.stages import encode as encode_stage
from lowvram.stages import sampling

ROWS: list[Any] = [
    {"prompt": "a red circle", "seed": 5},
    {"prompt": "a green heart", "seed": [6, 7], "size": (64, 128), "guidance_scale": 1.0},
    {"prompt": "a red circle", "seed": 8, "steps": 1, "negative_prompt": "blue"},
    {"prompt": "a blue star", "seed": 9},
]
OPTIONS: dict[str, Any] = {"steps": 2, "in_process": True}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The classes that are loaded, in order."""
    seen: list[str] = []
    real = component.use

    def use(class_name: str, *rest: Any) -> Any:
        seen.append(class_name.partition(".")[2])
        return real(class_name, *rest)

    for module in ("encode", "denoise", "decode"):
        monkeypatch.setattr(f"lowvram.stages.{module}.use", use)
    yield seen


def test_one_load_a_stage_and_the_pictures_of_lone_runs(tmp_path: Path, loads: list[str]) -> None:
    """Mixed sizes, steps, guidance and images; in the order of the rows, bit for bit."""
    made = lowvram.run_many(ROWS, "demo", tmp_path / "list", **OPTIONS)
    assert loads == ["T5EncoderModel", "PixArtTransformer2DModel", "AutoencoderKL"]
    assert [row.number for row in made.rows] == [1, 2, 3, 4] and made.failed == []
    assert [(image.prompt, image.seed, image.width) for image in made.images] == [
        ("a red circle", 5, 128),
        ("a green heart", 6, 64),
        ("a green heart", 7, 64),
        ("a red circle", 8, 128),
        ("a blue star", 9, 128),
    ]
    for index, (row, own) in enumerate(zip(made.rows, ROWS, strict=True)):
        named = {name: value for name, value in own.items() if name != "prompt"}
        alone = lowvram.run(
            own["prompt"], "demo", tmp_path / f"{index}.png", **{**OPTIONS, **named}
        )
        for ours, theirs in zip(row.images, alone.images, strict=True):
            assert torch.equal(pixels(ours.path), pixels(theirs.path))
            assert ours.latents.read_bytes() == theirs.latents.read_bytes()
            assert ours.embeds.read_bytes() == theirs.embeds.read_bytes()


def test_rows_that_are_alike_share_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each text is encoded once, whoever wants it."""
    sizes: list[int] = []
    real = sampling._denoise_batch
    monkeypatch.setattr(sampling, "_denoise_batch", lambda *a: sizes.append(len(a[3])) or real(*a))
    texts: list[int] = []
    real_all = encode_stage._encode_all
    monkeypatch.setattr(
        encode_stage, "_encode_all", lambda *a: texts.append(len(a[0])) or real_all(*a)
    )
    made = lowvram.run_many(ROWS, "demo", tmp_path, batch_size=2, **OPTIONS)
    assert sizes == [2, 2, 1]  # rows 1 and 4; row 2; row 3
    assert texts == [5]  # circle, heart, star, "" and "blue"
    assert made.stages[1]["settings"]["differing"] == [
        "guidance_scale", "rendered", "requested", "steps",
    ]  # fmt: skip
    again = lowvram.run("a blue star", "demo", tmp_path / "x.png", seed=9, **OPTIONS)
    difference = (pixels(made.rows[3].images[0].path) - pixels(again.images[0].path)).abs().max()
    assert difference <= 1


BAD: dict[str, tuple[Any, type[errors.LowvramError], str]] = {
    "size": ({"prompt": "a cat", "size": (9, 9)}, errors.RequestError, "size 9x9 is out of range"),
    "prompt": ({"prompt": " "}, errors.RequestError, "the prompt is empty"),
    "markup": ({"prompt": "<b></b>"}, errors.RequestError, "nothing is left of the prompt"),
    "field": ({"prompt": "a cat", "colour": 1}, errors.RequestError, "a row has no 'colour'"),
    "shared": ({"prompt": "a cat", "dtype": "fp32"}, errors.RequestError, "dtype is one for the"),
    "sigmas": ({"prompt": "a cat", "sigmas": [9, 1]}, errors.RequestError, "no explicit sigmas"),
    "jpg": ({"prompt": "a cat", "output": "x.jpg"}, errors.RequestError, "does not end in .png"),
    "taken": ({"prompt": "a cat", "output": "good.png"}, errors.RequestError, "is row 1's already"),
    "folder": ({"prompt": "a cat", "output": "dir.png"}, errors.StorageError, "is a folder"),
    "nul": ({"prompt": "a cat", "output": "a\0b"}, errors.RequestError, "is no path"),
    "null": ({"prompt": "a cat", "image": "a\0b"}, errors.RequestError, "is no path"),
    "latents": ({"prompt": "a cat", "latents": "no"}, errors.RequestError, "do not exist"),
}


def test_a_bad_row_is_reported_and_ends_no_other(tmp_path: Path) -> None:
    (tmp_path / "dir.png").mkdir()
    good = {"prompt": "a red circle", "output": "good"}
    rows = [good, *(row for row, _, _ in BAD.values()), "a blue star"]
    made = lowvram.run_many(rows, "demo", tmp_path, steps=1, in_process=True)
    assert [row.number for row in made.failed] == list(range(2, len(BAD) + 2))
    for row, (_, kind, says) in zip(made.failed, BAD.values(), strict=True):
        assert type(row.error) is kind and says in str(row.error)
        assert row.images == []
    assert made.images[0].path == tmp_path / "good.png"
    assert made.images[-1].path == tmp_path / "014-a-blue-star.png"
    assert all(image.path.is_file() for image in made.images)
    with pytest.raises(errors.RowsFailedError, match=r"^12 of 14 rows failed; .* row 2: size 9x9"):
        made.raise_failed()


@pytest.mark.parametrize("option", ["--refine", "--refine-strength 0.2", "--refiner x"])
def test_a_list_is_not_refined_and_says_so(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"prompt": "a red circle"}\n{"prompt": "a star", "refine": true}\n')
    line = ["run", "--prompts", str(path), "-m", "demo", "-o", str(tmp_path / "made")]
    assert cli.exit_code([*line, *option.split()]) == errors.RequestError.exit_code
    assert f"{option.split()[0]} is of a single run" in capsys.readouterr().err
    if option == "--refine":
        assert cli.exit_code([*line, "--steps", "1", "--in-process"]) == 10
        assert "row 2 (line 2): a row has no 'refine'" in capsys.readouterr().err
        rows: Any = [{"prompt": "a red circle", "refine": True}]
        [row] = lowvram.run_many(rows, "demo", tmp_path / "made", in_process=True).failed
        assert "refine is of a single run" in str(row.error)


@pytest.mark.parametrize("name", ["image", "start", "latents", "embeds"])
@pytest.mark.parametrize("reader_first", [True, False])
def test_no_row_writes_what_another_starts_from(
    name: str, reader_first: bool, tmp_path: Path
) -> None:
    """However the path is said, and a link is as good as the file; the other row is made."""
    (src,) = lowvram.run("a cat", "demo", tmp_path / "src.png", steps=1, in_process=True).images
    own = {
        k.removeprefix("0."): v[None]
        for k, v in load_file(src.embeds).items()
        if k.startswith("0.")
    }
    files: dict[str, tuple[str, bytes]] = {
        "image": ("w.png", src.path.read_bytes()),
        "start": ("w.latents.safetensors", src.latents.read_bytes()),
        "latents": ("w.image.latents.safetensors", save({"latents": torch.zeros(1, 4, 16, 16)})),
        "embeds": ("w.embeds.safetensors", save(own)),
    }
    file, before = files[name]
    (tmp_path / file).write_bytes(before)
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / file
    link.symlink_to(f"../{file}")
    writer = {"prompt": "a red circle", "output": "links/../w.png", "image": src.path}
    reader = {"prompt": "a blue star", name: link, "output": "two.png"}
    rows: list[Any] = [reader, writer] if reader_first else [writer, reader]
    found = lowvram.run_many(rows, "demo", tmp_path, steps=2, in_process=True)
    (failed,) = found.failed
    assert failed.number == rows.index(writer) + 1
    assert "would be overwritten" in str(failed.error)
    assert (tmp_path / file).read_bytes() == before and (tmp_path / "two.png").is_file()


@pytest.mark.parametrize("field", ["prompt", "image", "scheduler", "embeds", "output", "seed"])
def test_half_a_character_is_one_rows_error(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the report of all rows is written, and can be read."""
    monkeypatch.chdir(tmp_path)
    bad = json.dumps({"prompt": "a star", field: "a \ud800 red"})
    Path("list.jsonl").write_text(f'{{"prompt": "a red circle"}}\n{bad}\n')
    line = ["run", "--prompts", "list.jsonl", "-m", "demo", "-o", "made", "--steps", "1", "--json"]
    assert cli.exit_code([*line, "--in-process"]) == errors.RowsFailedError.exit_code
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == json.loads(Path("made/batch.report.json").read_text())["rows"]
    assert told["rows"][0]["error"] is None and Path(told["images"][0]["path"]).is_file()
    assert "\\ud800" in told["rows"][1]["error"]["message"]


def test_what_a_row_says_takes_the_place_of_what_it_excludes() -> None:
    shared = {"steps": 5, "image": "a.png", "eta": 0.1}
    merged = _merged(shared, {"timesteps": [9, 3], "start": "x.latents.safetensors"})
    assert merged == {"timesteps": [9, 3], "start": "x.latents.safetensors", "eta": 0.1}
    assert _merged(shared, {"seed": 3}) == shared | {"seed": 3}


def test_what_concerns_all_rows_is_raised(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ModelError, match="nonsense"):
        lowvram.run_many(["a cat", "a dog"], "nonsense", tmp_path, in_process=True)
    with pytest.raises(errors.RequestError, match="has no rows"):
        lowvram.run_many([], "demo", tmp_path)
    with pytest.raises(errors.RequestError, match="name a folder"):
        lowvram.run_many(["a cat"], "demo", tmp_path / "x.png")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_nan_in_one_picture_loses_no_other(
    batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sampling._denoise_batch

    def poisoned(group: Any, network: Any, scheduler: Any, starts: Any, *others: Any) -> Any:
        latents = real(group, network, scheduler, starts, *others)
        for index, start in enumerate(starts):
            latents[index] *= float("nan") if start.seed == 2 else 1
        return latents

    monkeypatch.setattr(sampling, "_denoise_batch", poisoned)
    rows: list[Any] = [{"prompt": "a red circle", "seed": [seed, seed + 10]} for seed in (1, 2, 3)]
    made = lowvram.run_many(rows, "demo", tmp_path, steps=1, batch_size=batch_size, in_process=True)
    assert [row.number for row in made.failed] == [2]
    assert isinstance(made.rows[1].error, errors.NonFiniteError)
    assert "kept: " in str(made.rows[1].error) and "lowvram denoise" in str(made.rows[1].error)
    assert [image.seed for image in made.images] == [1, 11, 3, 13]
    assert not list(tmp_path.glob("002*.latents.safetensors"))


def test_out_of_memory_goes_a_step_down_for_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And at the bottom of the list the largest pictures are given up, not all."""
    calls: list[int] = []
    real = WholeDecode.decode

    def second_fails(self: WholeDecode, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(self, *arguments)

    monkeypatch.setattr(WholeDecode, "decode", second_fails)
    rows: list[Any] = ["a red circle", "a blue star", {"prompt": "a heart", "size": (64, 128)}]
    made = lowvram.run_many(rows, "demo", tmp_path, steps=1, in_process=True)
    assert made.failed == [] and len(calls) == 2  # the others in strips
    assert made.stages[2]["weights"] == "strips"

    def large_fail(self: WholeDecode, vae: Any, latents: Any, *rest: Any) -> Any:
        if latents.shape[-1] == 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(self, vae, latents, *rest)

    monkeypatch.setattr(WholeDecode, "decode", large_fail)
    made = lowvram.run_many(rows, "demo", tmp_path, steps=1, decode="whole", in_process=True)
    assert [row.number for row in made.failed] == [1, 2]
    assert made.failed[0].error is not None and made.failed[0].error.exit_code == 6
    monkeypatch.setattr(WholeDecode, "decode", runs_out(99))
    with pytest.raises(errors.MemoryExhaustedError, match="--decode strips"):
        lowvram.run_many(rows[:2], "demo", tmp_path, steps=1, decode="whole", in_process=True)


def test_a_row_that_no_budget_holds_is_refused_and_the_others_made(
    tmp_path: Path, loads: list[str]
) -> None:
    rows: list[Any] = ["a red circle", {"prompt": "a star", "size": (1024, 1024)}]
    made = lowvram.run_many(
        rows, "demo", tmp_path, steps=1, decode="whole", stage_budget=40 << 20, binning=False,
        in_process=True,
    )  # fmt: skip
    assert [row.number for row in made.failed] == [2]
    assert "needs" in str(made.failed[0].error) and "--stage-budget" in str(made.failed[0].error)
    assert not list(tmp_path.glob("002*"))
    assert len(loads) == 3


def test_what_was_foretold_holds_for_the_largest(tmp_path: Path) -> None:
    """One decision for mixed sizes; measured by counting tensors, as with a budget on a CPU."""
    made = lowvram.run_many(ROWS, "demo", tmp_path, batch_size=2, stage_budget=1 << 30, **OPTIONS)
    for report in made.stages:
        foretold = report["predicted"]["peak_allocated_bytes"]
        assert 0.5 * foretold <= report["peak_allocated_bytes"] <= 1.01 * foretold
        assert report["budget_bytes"] == 1 << 30


def test_an_interruption_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sampling._denoise_batch

    def stops(group: Any, network: Any, scheduler: Any, starts: Any, *others: Any) -> Any:
        if starts[0].seed == 2:
            raise KeyboardInterrupt
        return real(group, network, scheduler, starts, *others)

    monkeypatch.setattr(sampling, "_denoise_batch", stops)
    rows: list[Any] = [{"prompt": "a red circle", "seed": seed} for seed in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        lowvram.run_many(rows, "demo", tmp_path, steps=1, in_process=True)
    assert [path.name[:3] for path in sorted(tmp_path.glob("*.latents.*"))] == ["001"]
    assert len(list(tmp_path.glob("*.embeds.*"))) == 3


CSV = (
    'prompt;max-tokens;seed;size;weighting;output\na "big" (cat);20;3-4;64x128;yes;\n\nb,c;;;;;d\n'
)
JSONL = (
    '{"prompt": "a \\"big\\" (cat)", "max_tokens": 20, "seed": [3, 4], "size": "64x128",'
    ' "weighting": true}\n\n{"prompt": "b,c", "output": "d", "steps": null}\n'
)


def listed(text: str, name: str, monkeypatch: pytest.MonkeyPatch) -> list[Listed]:
    """The rows of a text on standard input, or in a file of that name."""
    known = fields_of(commands.run, commands.of_the_list())
    if name == "-":
        data = io.BytesIO(text.encode())
        monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": data})())
    else:
        Path(name).write_text(text, encoding="utf-8-sig")
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(commands.run).parameters.items()
    }
    given = {**defaults, "steps": 7}
    return [to_listed(line, known, given, commands.for_run) for line in read_lines(name, known)]


def test_the_three_forms_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = listed(CSV, "list.csv", monkeypatch)
    assert [each.line for each in first] == [2, 4]
    row: Any = first[0].row
    assert (row["prompt"], row["seed"], row["max_tokens"]) == ('a "big" (cat)', [3, 4], 20)
    assert row["weighting"] is True and row["steps"] == 7 and "dtype" not in row
    assert str(row["size"]) == "64x128"
    assert first[1].row["output"] == "d"  # type: ignore[index]
    for text, name in ((JSONL, "list.jsonl"), (JSONL, "-"), (CSV, "-")):
        assert [each.row for each in listed(text, name, monkeypatch)] == [e.row for e in first]
    lines = listed("# no\n\n a cat \n\\#1 dad\n", "list.txt", monkeypatch)
    assert [(each.line, each.row["prompt"]) for each in lines] == [  # type: ignore[index]
        (3, "a cat"),
        (4, "#1 dad"),
    ]


def test_steps_of_a_row_stand_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command line's steps do not contradict a row's timesteps."""
    monkeypatch.chdir(tmp_path)
    (only,) = listed('{"prompt": "a", "timesteps": [900, 100]}', "-", monkeypatch)
    assert only.row["timesteps"] == [900, 100] and only.row["steps"] is None  # type: ignore[index]
    merged = _merged({"steps": 7, "eta": 0.5}, {"timesteps": [9, 1]})
    assert merged == {"eta": 0.5, "timesteps": [9, 1]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"prompt": "a", "seed": "x"}', "seed 'x' is not a number"),
        ('{"prompt": "a", "steps": 2.5}', "steps 2.5 is not a whole number"),
        ('{"prompt": "a", "steps": true}', "steps True makes no sense"),
        ('{"prompt": "a", "binning": "maybe"}', "binning 'maybe' is neither true nor false"),
        ('{"prompt": "a", "model": "demo"}', "a row has no 'model'"),
        ('{"prompt": "a"', "is not JSON"),
        ("[1]", "is no object"),
        ('{"prompt": "a", "--steps": 2, "Steps": 3}', "a row says 'Steps' twice, as '--steps' too"),
        ('{"prompt": "a", "steps": 2, "steps": 3}', "a row says 'steps' twice: say it once"),
    ],
)
def test_a_row_that_makes_no_sense(
    text: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    bad, good = listed(f'{text}\n"a cat"\n', "list.jsonl", monkeypatch)
    assert isinstance(bad.row, errors.RequestError) and says in str(bad.row)
    assert good.row["prompt"] == "a cat"  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("no.csv", None, "no.csv cannot be read"),
        ("a.csv", b"prompt,colour\na,b\n", "has a column 'colour': use "),
        ("a.csv", b"seed\n1\n", "needs a header with a column prompt"),
        ("a.csv", b'prompt\n"a red circle\na star\n', "line 2: unexpected end of data: close"),
        ("a.csv", b'prompt\n"a "big" cat"\n', "line 2: ',' expected after '\"': close each quote"),
        ("a.txt", b"a\nb\xff\n", "is not UTF-8 (line 2)"),
        ("a.txt", b"# nothing\n", "has no rows"),
    ],
)
def test_a_list_that_makes_no_sense(
    name: str,
    data: bytes | None,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if data is not None:
        Path(name).write_bytes(data)
    assert cli.exit_code(["run", "--prompts", name, "-m", "demo"]) == 2
    assert says in capsys.readouterr().err
    assert cli.exit_code(["run", "a cat", "--prompts", name]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert cli.exit_code(["run"]) == 2
    assert "--prompts" in capsys.readouterr().err


def test_the_page_about_lists(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its command with its list, in processes; and a list with a bad row, told as JSON."""
    monkeypatch.chdir(tmp_path)
    (csv,), (lines,) = (pages.blocks("batches.md", kind) for kind in ("csv", "json"))
    Path("list.csv").write_text(csv)
    (command,) = pages.commands("batches.md")
    assert cli.exit_code(command) == 0
    names = sorted(path.name for path in Path("pictures").glob("*.png"))
    assert names == [
        "001-a-large-blue-star-on-a-yellow-background.png",
        *(f"002-a-red-circle-at-the-top-{n}.png" for n in range(3)),
        "heart.png",
    ]
    capsys.readouterr()
    Path("list.jsonl").write_text(lines + '{"prompt": "a cat", "size": "9x9"}\n')
    arguments = ["run", "--prompts", "list.jsonl", "-m", "demo", "--steps", "1", "--in-process"]
    assert cli.exit_code([*arguments, "--json"]) == errors.RowsFailedError.exit_code
    out, err = capsys.readouterr()
    first, second = json.loads(out)["rows"]
    assert [image["seed"] for image in first["images"]] == [7, 9] and first["error"] is None
    assert all(Path(image["path"]).parent == Path("outputs/list") for image in first["images"])
    assert (second["row"], second["line"], second["images"]) == (2, 2, [])
    assert second["error"]["kind"] == "RequestError" and second["error"]["exit_code"] == 2
    assert err.splitlines()[-1].startswith(
        "lowvram: 1 of 2 rows failed; the first of them is row 2"
    )
    for named in ("outputs/list", first["images"][1]["path"]):
        assert cli.exit_code(["report", named]) == 0
        assert "denoise" in capsys.readouterr().out


def test_a_list_takes_what_a_run_takes() -> None:
    """Of the command line a row may say it or the list does; from Python both know the same."""
    parameters = set(inspect.signature(commands.run).parameters)
    shared = commands.of_the_list()
    known = fields_of(commands.run, shared)
    rows = {field.parameter for field in known.values()}
    assert rows | set(shared) == parameters and rows.isdisjoint(shared)
    # What `rows.py` takes from no row, none is offered.
    refused = {*SHARED, *REFINING}
    assert {option_name(name) for name in shared} == refused | set(commands._BESIDE)
    # What a row says must reach the options of a run.
    parameters_of_run = inspect.signature(commands.run).parameters
    options = commands.for_run({name: p.default for name, p in parameters_of_run.items()})
    assert set(options) <= set(RunOptions.__annotations__)
    assert len(options) == len(parameters - set(commands._BESIDE) - {"karras"})
    one, many = (
        list(inspect.signature(each).parameters)[1:] for each in (lowvram.run, lowvram.run_many)
    )
    of_one = ("callback", "callback_steps")  # sees the latents of a single run
    assert [name for name in one if name not in of_one] == many


def test_names_are_stable_and_a_folder_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def made() -> batch.BatchResult:
        return lowvram.run_many(["a cat"], "demo", steps=1, in_process=True)

    assert made().images[0].path == Path("outputs/batch/001-a-cat.png")
    assert made().images[0].path == Path("outputs/batch-2/001-a-cat.png")
