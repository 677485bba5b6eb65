"""The command line: arguments to one call to one result. Imports no torch.

Results go to stdout, everything else to stderr; errors are one line and a documented exit code.
"""

import errno
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated

import typer

from lowvram import errors
from lowvram.cli import caches, compare, models, pictures, plans, refine, run, stages, tools
from lowvram.cli.streams import give_up, prepare_streams, say

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
        print(f"lowvram {metadata.version('lowvram')}")
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
    prepare_streams()
    code = exit_code(sys.argv[1:])
    try:
        sys.stderr.flush()
    except OSError:
        give_up(sys.stderr)
    sys.exit(code)


def exit_code(arguments: Sequence[str]) -> int:
    """Carry out a command line and return its exit code (see errors.py)."""
    try:
        code = _carry_out(arguments)
        sys.stdout.flush()
        return code
    except errors.LowvramError as error:
        return _failed(error)
    except KeyboardInterrupt:
        say("lowvram: interrupted")
        return errors.INTERRUPTED_EXIT_CODE
    except OSError as error:
        if error.filename is not None or error.errno not in {errno.EPIPE, *errors.NO_SPACE}:
            raise
        give_up(sys.stdout)
        if error.errno == errno.EPIPE:  # the reader of our output has had enough
            return 0
        return _failed(errors.storage_error(error, "printing"))


def _carry_out(arguments: Sequence[str]) -> int:
    try:
        code = app(list(arguments), standalone_mode=False)
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # what typer makes of it
            raise ended.__context__ from None
        raise
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())  # type: ignore[attr-defined]
            return 0
        if hasattr(error, "format_message"):  # click's: an unknown option, a missing argument
            raise errors.RequestError(f"{error.format_message()} (see lowvram --help)") from None
        raise
    if code == errors.INTERRUPTED_EXIT_CODE:  # what typer makes of Ctrl-C
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _failed(error: errors.LowvramError) -> int:
    say(f"lowvram: {error}")
    return error.exit_code
