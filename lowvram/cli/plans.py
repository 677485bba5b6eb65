"""The command that foretells a run: a table for people, a document for programs."""

import inspect
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowvram.cli.options import AsJson
from lowvram.cli.output import print_json
from lowvram.cli.run import for_run, run
from lowvram.errors import RequestError

if TYPE_CHECKING:
    from lowvram.stages.plan import Row

_NOT_OF_PLAN = ("output", "in_process", "as_json", "prompts_file")
_COLUMNS = (
    ("allocated", "peak_allocated_bytes"),
    ("reserved", "peak_reserved_bytes"),
    ("process", "peak_process_bytes"),
    ("RAM", "peak_rss_bytes"),
    ("read", "disk_read_bytes"),
)


def plan(every: bool, as_json: bool, device: str, **arguments: Any) -> None:
    """What each stage of a run would hold, read and take, before anything is downloaded or loaded.

    \b
    lowvram plan "a cactus with a happy face" --vram 4GiB
    lowvram plan "a cactus with a happy face" --size 2048x2048 -m pixart-sigma-2k --vram 2GiB --all

    From the configuration files alone. Takes the arguments of run; with --vram for a CUDA card of
    that budget, whether there is one here or not, unless --device says otherwise.
    """
    from uuid import uuid4

    from lowvram.request.run import resolve_run
    from lowvram.swaps import resolve_with
    from lowvram.terminal import quiet_environment

    quiet_environment()
    named = (arguments.pop("model"), arguments.pop("revision"))
    others = {role: arguments.pop(role) for role in ("transformer", "vae", "text_encoder")}
    model = resolve_with(*named, **others)
    prompts = arguments.pop("prompts")
    if not prompts:
        raise RequestError("say what the picture shall show")
    # Nothing is written: a name that no picture has, in a folder that can be everywhere.
    nowhere = Path(gettempdir(), f"{uuid4().hex}.png")
    options: Any = for_run({**arguments, "device": device})
    tasks = resolve_run(prompts, model, nowhere, **options)
    from lowvram.stages import plan as planning  # imports torch

    if tasks.denoise.asks_the_scheduler:
        from lowvram.stages.denoise import check_each

        refused: list[Any] = []  # here as it would be in the run
        check_each([tasks.denoise], lambda _, outcome: refused.append(outcome))
        if refused:
            raise refused[0]
    there = planning.device_to_plan_for(device, tasks.encode.vram)
    rows = planning.plan(tasks, there, every)
    if arguments["refine"]:
        from lowvram.request.refine import refining_of_run

        after = refining_of_run(tasks, nowhere, arguments["refine_strength"], arguments["refiner"])
        rows += planning.plan_refining(after, there, every)
    if as_json:
        print_json(as_document(rows, str(there)))
    else:
        print(as_table(rows, str(there)))


def as_table(rows: "Sequence[Row]", device: str) -> str:
    """One line a way, sizes in decimal GB, columns that no row knows left out; reasons below."""
    shown = [(t, n) for t, n in _COLUMNS if any(row.predicted[n] is not None for row in rows)]
    lines = [["", "stage", "way", "dtype", *(title for title, _ in shown), "time"]]
    for row in rows:
        mark = "*" if row.reason else " " if row.fits else "x"
        sizes = [_gb(row.predicted[name]) for _, name in shown]
        lines.append([mark, row.stage, row.way, row.dtype, *sizes, _time(row.predicted["seconds"])])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if i < 4 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    told = {row.stage for row in rows if row.reason}
    text += ["", f"for {device}; * chosen, x does not fit"]
    text += [f"{row.stage}: {row.reason}" for row in rows if row.reason]
    text += [
        f"{stage}: nothing fits"
        for stage in dict.fromkeys(row.stage for row in rows)
        if stage not in told
    ]
    return "\n".join(text)


def as_document(rows: "Sequence[Row]", device: str) -> dict[str, Any]:
    """Bytes and seconds; null where a device has no such counter."""
    return {
        "device": device,
        "stages": [{**asdict(row), "chosen": bool(row.reason)} for row in rows],
    }


def _gb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e9:.3f} GB"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _signature() -> inspect.Signature:
    """The arguments of `run`, without those about its output, and two of its own."""
    shared = inspect.signature(run).parameters
    own = {
        "every": Annotated[bool, typer.Option("--all", help="Every way, also what does not fit.")],
        "as_json": AsJson,
    }
    kept = [p for name, p in shared.items() if name not in _NOT_OF_PLAN]
    kept += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in own.items()
    ]
    return inspect.Signature(kept)


plan.__signature__ = _signature()  # type: ignore[attr-defined]
plan.__annotations__ = {p.name: p.annotation for p in _signature().parameters.values()}
