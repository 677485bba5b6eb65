"""What there is to choose from: the models known by name, and the schedulers of one of them."""

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowvram.cli.options import AsJson
from lowvram.cli.output import print_json
from lowvram.repository import DEFAULT_MODEL

if TYPE_CHECKING:
    from lowvram.stages.scheduler_kinds import Kind


def models(
    schedulers: Annotated[
        bool, typer.Option("--schedulers", help="What --scheduler takes with one model.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help=f"For --schedulers; default: {DEFAULT_MODEL}."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The models known by a short name; or the schedulers that a model can be used with.

    \b
    lowvram models
    lowvram models --schedulers -m demo
    """
    if not schedulers and model is not None:
        from lowvram.errors import RequestError

        raise RequestError(f"-m {model} is for --schedulers: add it, or leave -m out")
    rows = _scheduler_rows(model or DEFAULT_MODEL) if schedulers else _model_rows()
    if as_json:
        print_json({"schedulers" if schedulers else "models": rows})
        return
    print(_table(rows, _SCHEDULERS if schedulers else _MODELS))
    if schedulers:
        for row in rows:
            if row["refused"]:
                print(f"\n{row['name']}: {row['refused']}")
        without = [row["name"] for row in rows if row["ignores"]]
        if without:
            missing = sorted({each for row in rows for each in row["ignores"]})
            print(f"\nwithout the model's {', '.join(missing)}: {', '.join(without)}")


_MODELS = {
    "model": "name",
    "family": "family",
    "size": "size",
    "steps": "steps",
    "guidance": "guidance_scale",
    "where": "where",
    "completed by": "base",
}
_SCHEDULERS = {
    "name": "name",
    "spacing": "spacing",
    "noise levels": "sigma_spacings",
    "timesteps": "timesteps",
    "sigmas": "sigmas",
    "eta": "eta",
    "noise": "noise",
    "calls a step": "order",
    "what": "says",
}


def _model_rows() -> list[dict[str, Any]]:
    """From the families' lists alone: nothing is fetched."""
    from lowvram.families import all_families

    return [
        {
            "name": name,
            "family": family.name,
            "size": f"{each.side}x{each.side}" if each.side else "",
            "steps": each.steps or family.default_steps,
            "guidance_scale": each.guidance_scale or family.default_guidance_scale,
            "where": "bundled" if each.bundled else each.repository,
            "base": each.base,
        }
        for family in all_families().values()
        for name, each in family.models.items()
    ]


def _scheduler_rows(name: str) -> list[dict[str, Any]]:
    from lowvram.repository import resolve
    from lowvram.terminal import quiet_environment

    quiet_environment()
    with redirect_stdout(sys.stderr):  # a library that has something to say
        from lowvram.stages.scheduler_kinds import kinds_of

        found: list[Kind] = kinds_of(resolve(name))
    return [asdict(each) for each in found]


def _table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    lines = [list(columns)]
    for row in rows:
        lines.append([_cell(row[name]) for name in columns.values()])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "-"
    if isinstance(value, list | tuple):
        return ", ".join(value) or "-"
    return str(value) if value not in ("", None) else "-"
