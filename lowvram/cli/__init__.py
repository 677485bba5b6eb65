"""The command line: arguments to one call to one result. Imports no torch.

Results go to stdout, everything else to stderr; errors are one line and a documented exit code.
"""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from io import TextIOWrapper
from typing import Annotated

import typer

from lowvram import errors
from lowvram.cli import caches, compare, models, pictures, plans, refine, run, stages, tools

app = typer.Typer(
    name="lowvram",
    help="Pictures from diffusion transformers on small graphics cards, in stages that run alone: "
    "encode, denoise, decode, and before or after them encode-image and refine.",
    epilog='Try: lowvram run "a large blue star on a yellow background" -m demo',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    run.run,
    plans.plan,
    refine.refine,
    compare.compare,
    stages.encode,
    pictures.encode_image,
    pictures.interpolate,
    stages.denoise,
    stages.decode,
    models.models,
    tools.prepare,
    tools.report,
    tools.doctor,
):
    app.command()(command)
app.add_typer(caches.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"lowvram {version('lowvram')}")
        raise typer.Exit


@app.callback()
def _before_commands(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Takes the options that stand before a command."""


def main() -> None:
    """Entry point: errors become one line on stderr and an exit code."""
    for stream in (sys.stdout, sys.stderr):  # a path or prompt that this encoding lacks
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(exit_code(sys.argv[1:]))


def exit_code(arguments: Sequence[str]) -> int:
    """Carry out a command line and return its exit code (see errors.py)."""
    try:
        code = app(list(arguments), standalone_mode=False)
        if code == errors.INTERRUPTED_EXIT_CODE:  # what typer makes of Ctrl-C
            return _interrupted()
        return code if isinstance(code, int) else 0
    except errors.LowvramError as error:
        print(f"lowvram: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:  # the reader of our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())  # type: ignore[attr-defined]
            return 0
        if hasattr(error, "format_message"):  # click's: an unknown option, a missing argument
            print(f"lowvram: {error.format_message()} (see lowvram --help)", file=sys.stderr)
            return errors.RequestError.exit_code
        raise


def _interrupted() -> int:
    print("lowvram: interrupted", file=sys.stderr)
    return errors.INTERRUPTED_EXIT_CODE
