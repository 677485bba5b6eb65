"""The commands of docs/schedulers.md and docs/long-runs.md do what the pages say."""

import re
import shlex
from pathlib import Path

import pytest

from lowvram import cli

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["schedulers.md", "long-runs.md"])
def test_its_commands_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text(encoding="utf-8")
    commands = [
        line
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
        if line.startswith("lowvram ")
    ]
    assert len(commands) >= 2
    for line in commands:
        arguments = shlex.split(line)[1:]
        quick = ["--in-process"] if arguments[0] == "run" else []
        assert cli.exit_code([*arguments, *quick]) == 0, line
        if "-o" in arguments:
            assert Path(arguments[arguments.index("-o") + 1]).exists()
        if "--preview" in arguments:
            assert Path("early.preview.png").exists()
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, page, "exec"), {})
    assert not list(tmp_path.glob("*.checkpoint.safetensors"))
