"""The commands of docs/schedulers.md and docs/long-runs.md do what the pages say."""

from pathlib import Path

import pytest
from pages import blocks, commands

from lowvram import cli


@pytest.mark.parametrize("page", ["schedulers.md", "long-runs.md"])
def test_its_commands_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(commands(page)) >= 2
    for arguments in commands(page):
        quick = ["--in-process"] if arguments[0] == "run" else []
        assert cli.exit_code([*arguments, *quick]) == 0, arguments
        if "-o" in arguments:
            assert Path(arguments[arguments.index("-o") + 1]).exists()
        if "--preview" in arguments:
            assert Path("early.preview.png").exists()
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), {})
    assert not list(tmp_path.glob("*.checkpoint.safetensors"))
