"""Standard streams that are closed, full or no longer read: an exit code and one line, at most."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowvram import __main__, cli, errors

RUN = ["run", "a star", "-m", "demo", "--steps", "1", "--no-cache", "-o"]
FULL = Path("/dev/full")

needs_shell = pytest.mark.skipif(os.name != "posix", reason="of a POSIX shell")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")


def shell(line: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A line of shell, where "$@" is a command of lowvram."""
    command = ["sh", "-c", line, "sh", sys.executable, "-m", "lowvram", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@needs_shell
@pytest.mark.parametrize(
    "closed", ["2>&-", "<&- >&- 2>&-", pytest.param("2>/dev/full", marks=needs_full)]
)
def test_a_run_needs_no_stream(closed: str, tmp_path: Path) -> None:
    done = shell(f'"$@" {closed}', *RUN, tmp_path / "x.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "x.png").is_file()


@needs_shell
def test_a_run_goes_on_when_its_lines_are_no_longer_read(tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    done = shell(f'{{ "$@" 2>&1 >"{tmp_path}/out"; echo $? >"{tmp_path}/code"; }} | true',
                 *RUN, picture)  # fmt: skip
    assert done.stderr == "" and (tmp_path / "code").read_text() == "0\n"
    assert (tmp_path / "out").read_text().startswith(f"{picture}\n")


@needs_shell
@pytest.mark.parametrize("arguments", [["models"], ["models", "--schedulers", "-m", "demo"], []])
def test_output_that_no_one_reads_is_no_error(arguments: list[str]) -> None:
    done = shell('{ "$@"; echo $? >&2; } | true', *arguments)
    assert done.stderr == "0\n"


@needs_shell
@needs_full
def test_output_that_cannot_be_written_is_one_line() -> None:
    done = shell('"$@" >/dev/full', "models")
    assert done.returncode == 7
    assert done.stderr == (
        "lowvram: printing could not write the output (No space left on device): free some space\n"
    )


@needs_shell
def test_a_list_from_a_closed_stdin_has_no_rows(tmp_path: Path) -> None:
    done = shell('"$@" <&-', "run", "--prompts", "-", "-m", "demo")
    assert done.returncode == 2
    assert done.stderr == "lowvram: the list has no rows: write a prompt a line\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["decode", "no\nsuch.latents.safetensors"],
        ["run", "a star", "-m", "demo", "--scheduler", "e\x1b[1m\u2028uler"],
        ["run", "--bo\rgus"],
    ],
)
def test_a_message_is_one_line_whatever_is_in_it(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.exit_code(arguments) != 0
    err = capsys.readouterr().err
    assert err.startswith("lowvram: ") and err.endswith("\n")
    assert err[:-1].isprintable(), err


def test_an_interrupt_before_the_command_begins_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == errors.INTERRUPTED_EXIT_CODE
    assert capsys.readouterr().err == "lowvram: interrupted\n"
