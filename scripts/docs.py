"""Write docs/cli.md from the command line itself: `python scripts/docs.py`, inside `.venv`.

`--check` writes nothing and exits with 1 and one line when the file is stale; `scripts/check` calls
it. The text depends on lowvram/cli/ and lowvram/errors.py only, never on the terminal's width.
"""

import argparse
import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cli.md"

HEADER = """\
# Command line

Written by `scripts/docs.py` from the program itself: change the program, then run
`scripts/check --fix`.
"""


def main() -> int:
    """Write the page, or only compare it; return 1 if it was to be compared and is stale."""
    parser = argparse.ArgumentParser(description="Write docs/cli.md from the command line itself.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    check = parser.parse_args().check
    sys.path.insert(0, str(ROOT))  # the code beside this file, wherever an installed one came from
    from lowvram import cli, errors

    text = page(cli.app, errors.LowvramError)
    if not check:
        PAGE.write_text(text, encoding="utf-8", newline="\n")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE.relative_to(ROOT).as_posix()} is stale: run scripts/check --fix.")
    return 1


def page(app: typer.Typer, error: type[Exception]) -> str:
    """The whole page: every visible command of `app`, then the exit codes of `error`'s tree."""
    return "\n".join([HEADER, *_command(get_command(app), "lowvram", None), *_exit_codes(error)])


# typer carries its own copy of click, whose types have no public name: `Any` stands for click's
# Command and Context below.


def _command(command: Any, name: str, parent: Any) -> Iterator[str]:
    settings = command.context_settings  # the names of --help
    context = command.context_class(command, info_name=name, parent=parent, **settings)
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield f"## {context.command_path}\n"
    yield f"```text\n{usage}\n```\n"
    yield from _paragraphs(command.help or "")
    for title, kind in (("Argument", "argument"), ("Option", "option")):
        parameters = [p for p in command.get_params(context) if p.param_type_name == kind]
        rows = [record for p in parameters if (record := p.get_help_record(context))]
        if rows:
            yield f"| {title} | Meaning |\n|---|---|"
            yield "\n".join(f"| `{_cell(left)}` | {_cell(right)} |" for left, right in rows) + "\n"
    yield from _paragraphs(command.epilog or "")
    for child, subcommand in getattr(command, "commands", {}).items():
        if not subcommand.hidden:
            yield from _command(subcommand, child, context)


def _paragraphs(text: str) -> Iterator[str]:
    """Help text as Markdown; a paragraph that click must not rewrap (`\\b`) is a block of code."""
    for paragraph in inspect.cleandoc(text).split("\f")[0].split("\n\n"):
        lines = paragraph.splitlines()
        if lines and lines[0].strip() == "\b":
            yield "```text\n" + textwrap.dedent("\n".join(lines[1:])) + "\n```\n"
        elif lines:
            yield " ".join(line.strip() for line in lines) + "\n"


def _exit_codes(error: type[Exception]) -> Iterator[str]:
    """The table of `error` and all its subclasses, by exit code."""
    yield "## Exit codes\n"
    yield "| Code | Error | Meaning |\n|---|---|---|\n| 0 | | Done. |"
    for kind in sorted(set(_tree(error)), key=lambda kind: (kind.exit_code, kind.__name__)):
        meaning = inspect.cleandoc(kind.__doc__ or "").splitlines()[0]
        yield f"| {kind.exit_code} | `{kind.__name__}` | {_cell(meaning)} |"
    yield "| 130 | | Stopped with Ctrl-C. |\n"


def _tree(error: Any) -> Iterator[Any]:
    yield error
    for child in error.__subclasses__():
        yield from _tree(child)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    raise SystemExit(main())
