"""The pages in docs/, for tests that do what they say."""

import re
import shlex
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def text_of(page: str) -> str:
    """A page, "sizes.md"."""
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page: str, kind: str) -> list[str]:
    """What stands in the blocks of a kind: "sh", "python", "csv"."""
    return re.findall(rf"```{kind}\n(.*?)```", text_of(page), re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words of each command in the blocks of shell, after `lowvram`."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in found if words[:1] == ["lowvram"]]
