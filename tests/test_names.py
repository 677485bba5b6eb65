"""New names: each is one run's alone, and nothing of a name stays behind."""

import subprocess
import sys
from pathlib import Path

import pytest

import lowvram
from lowvram import cli, errors
from lowvram.names import new_folder, new_path


def named(folder: Path, prompt: str) -> str:
    """The name that a run gets which then makes nothing."""
    with new_path([prompt], ".png", folder) as path:
        return path.name


def test_runs_at_once_get_names_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with new_path(["a cat"], ".png", out) as path:
        assert path == out / "a-cat.png"
        assert named(out, "a cat") == "a-cat_2.png"
        assert named(out, "a cat 1") == "a-cat_1.png"  # not a picture of several of the first
        assert named(out, "a dog") == "a-dog.png"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("there", "name"),
    [
        ("a-cat-unrefined-0.png", "a-cat_2.png"),  # what a refiner that failed has left
        ("a-cat-1.png", "a-cat_2.png"),
        ("a-cat-10.report.json", "a-cat_2.png"),
        ("a-cat.embeds.safetensors", "a-cat_2.png"),
        ("a-cat-and-a-dog.png", "a-cat.png"),
    ],
)
def test_what_is_there_is_left_alone(there: str, name: str, tmp_path: Path) -> None:
    (tmp_path / there).touch()
    assert named(tmp_path, "a cat") == name
    assert [path.name for path in tmp_path.iterdir()] == [there]


@pytest.mark.parametrize("error", [errors.ModelError, KeyboardInterrupt])
def test_a_run_that_fails_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), new_path(["a cat"], ".png", tmp_path / "a" / "b"):
        raise error
    with pytest.raises(error), new_folder("list", tmp_path / "a"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_folders_of_lists_at_once(tmp_path: Path) -> None:
    with new_folder("my list", tmp_path) as one, new_folder("my list", tmp_path) as other:
        assert (one.name, other.name) == ("my-list", "my-list-2")
        (other / "x.png").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["my-list-2"]


def test_two_commands_at_once_lose_no_picture(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "lowvram", "run", "a red circle", "-m", "demo", "--steps", "1"]
    options = ["-o", str(tmp_path / "out"), "--in-process"]
    both = [
        subprocess.Popen([*line, *options, "--seed", seed], stdout=subprocess.PIPE, text=True)
        for seed in "12"
    ]
    told = sorted(str(each.communicate()[0]).splitlines()[0] for each in both)
    assert [Path(each).name for each in told] == ["a-red-circle.png", "a-red-circle_2.png"]
    assert all(Path(each).is_file() for each in told)
    assert not list((tmp_path / "out").glob("*.taken"))


def test_numbered_pictures_replace_no_other_prompts(tmp_path: Path) -> None:
    asked = ("a red circle 1", [2]), ("a red circle", [3, 4]), ("a red circle", [5])
    made = [
        lowvram.run(prompt, "demo", tmp_path, steps=1, seed=seeds, in_process=True).images
        for prompt, seeds in asked
    ]
    assert [[image.path.name for image in images] for images in made] == [
        ["a-red-circle_1.png"],
        ["a-red-circle-0.png", "a-red-circle-1.png"],
        ["a-red-circle_2.png"],
    ]


LONG = "n" * 300


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (["encode", "a cat", "-o", f"{LONG}.embeds.safetensors"], 7),
        (["run", "a cat", "-o", f"{LONG[:240]}.png"], 7),
        (["run", "a cat", "-o", f"new/{LONG[:240]}.png"], 7),
        (["run", "a cat", "-o", f"{LONG}/x.png"], 7),
        (["run", "a cat", "-o", LONG], 7),
        (["run", "--prompts", "list.txt", "-o", f"{LONG}/x"], 7),
        (["run", "a cat", "--latents", LONG], 2),
        (["run", "a cat", "--embeds", LONG], 2),
        (["run", "a cat", "--start", LONG], 4),
        (["run", "a cat", "--vae", LONG], 3),
    ],
)
def test_a_name_that_is_too_long_is_one_line_before_any_work(
    line: list[str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("a cat")
    assert cli.exit_code([*line, "-m", "demo"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("lowvram: ")
    assert [path.name for path in tmp_path.iterdir()] == ["list.txt"]


def test_a_row_with_a_name_that_is_too_long_ends_alone(tmp_path: Path) -> None:
    """And the longest name that the check lets pass is written."""
    rows = [{"prompt": "a cat", "output": "x" * length} for length in (300, 235, 232)]
    made = lowvram.run_many(rows, "demo", tmp_path, steps=1, in_process=True)  # type: ignore[arg-type]
    assert [row.error and row.error.exit_code for row in made.rows] == [7, None, None]
    assert [image.path.is_file() for image in made.images] == [True, True]
