"""The commands around the pictures: what is prepared, what a run took, what the machine can do."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from lowvram import errors
from lowvram.artifacts import write_bytes
from lowvram.cli.options import (
    AsJson,
    PreparedWeights,
    Revision,
    TextEncoder,
    Transformer,
)
from lowvram.cli.output import print_json, showing_progress


def prepare(
    model: Annotated[
        str | None,
        typer.Argument(help="Short name (pixart-sigma-1024, demo, …), repository or folder."),
    ] = None,
    weights: PreparedWeights = "bf16",
    to: Annotated[
        Path | None, typer.Option("--to", help="Folder to put it in; default: the cache.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--list", help="Show what is prepared, with sizes.")
    ] = False,
    remove: Annotated[
        str | None,
        typer.Option("--remove", metavar="NAME", help="Delete: a name from the list, or a model."),
    ] = None,
    revision: Revision = None,
    transformer: Transformer = None,
    text_encoder: TextEncoder = None,
    as_json: AsJson = False,
) -> None:
    """Write once what every later run reads: half of what is published, or a quarter.

    \b
    lowvram prepare pixart-sigma-1024 --weights 8bit
    lowvram prepare --list
    """
    from lowvram import prepared

    if (model is not None) + show + (remove is not None) != 1:
        raise errors.RequestError("name a model to prepare, or use --list or --remove NAME")
    given = (to, revision, transformer, text_encoder)
    if model is None and (weights != "bf16" or any(each is not None for each in given)):
        raise errors.RequestError(
            "--weights, --to, --revision and the like are for preparing a model: "
            "leave them out here"
        )
    if transformer is not None and weights != "bf16":
        raise errors.RequestError(
            f"--transformer has no effect with --weights {weights}, which is of the text encoder: "
            "leave it out"
        )
    if remove is not None:
        freed = prepared.remove(remove)
        if as_json:
            print_json({"freed_bytes": freed})
        else:
            print(f"freed {freed / 1e6:,.1f} MB")
        return
    entries = prepared.list_prepared()
    if model is not None:
        from lowvram.swaps import resolve_with

        with showing_progress() as on_progress:
            from lowvram.stages.prepare import prepare as write

            found = resolve_with(
                model, revision, transformer=transformer, text_encoder=text_encoder
            )
            made = write(found, weights, to, on_progress)
        entries = [each for each in prepared.list_prepared() if each.prepared in made]
    if as_json:
        print_json({"prepared": [each.to_json() for each in entries]})
    for each in () if as_json else entries:
        print(f"{each.bytes / 1e6:10,.1f} MB  {each.state:<10}  {each.name}  {each.path}")


def report(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="x.report.json, or the picture x.png, or a folder for its newest."
        ),
    ],
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", help="Also write one page that needs nothing else, no network either."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw memory over time: x.png or x.svg.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Memory and time of each stage of an earlier run, measured and predicted.

    \b
    lowvram report outputs/a-red-heart.png
    lowvram report outputs --html report.html --plot timeline.svg
    """
    from lowvram.memory import report_files
    from lowvram.memory.report import table

    _check_suffix("--html", html, ("html", "htm"))
    kind = _check_suffix("--plot", plot, ("png", "svg"))
    path = report_files.find(run)
    document = report_files.read(path)
    if html is not None:
        from lowvram.memory.page import page

        write_bytes(html, page(document, path.parent).encode("utf-8", "replace"))
    if plot is not None:
        from lowvram.memory.plot import plot as draw

        write_bytes(plot, draw(document["stages"], kind))
    if as_json:
        print_json(document)
        return
    print(table(document["stages"]))
    for written in filter(None, (html, plot)):
        print(written)


def doctor(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Measure no rates: show those of the last time."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What this machine has, what works on it and how fast it is: a text to paste into a report.

    \b
    lowvram doctor
    lowvram doctor --quick --json

    Names neither the user nor the home folder. Rates are measured in a few seconds and remembered.
    Exits with 5 when something that is needed is missing, too old or computes nonsense: a package,
    the device, bfloat16, and on CUDA 8-bit layers, which the published recipe uses.
    """
    from lowvram.doctor import diagnose
    from lowvram.terminal import quiet_environment

    quiet_environment()
    with redirect_stdout(sys.stderr):  # a library that has something to say
        found = diagnose(quick)
    if as_json:
        print_json(found.to_json())
    else:
        print(found.to_text())
    if found.broken:
        raise errors.DeviceError(
            f"needed here and not working: {', '.join(found.broken)}: see their lines above"
        )


def _check_suffix(option: str, path: Path | None, kinds: Sequence[str]) -> str:
    """The kind of file that a path's suffix names.

    Raises:
        RequestError: it names another kind, or none: nothing is overwritten by mistake.
    """
    kind = "" if path is None else path.suffix.lower().removeprefix(".")
    if path is not None and kind not in kinds:
        raise errors.RequestError(f"{option} {path} does not end in .{' or .'.join(kinds)}")
    return kind
