"""`lowvram cache`: the embeddings that were kept, listed and deleted."""

import re
import time
from typing import Annotated

import typer

from lowvram import errors
from lowvram.cli.options import AsJson
from lowvram.cli.output import print_json

app = typer.Typer(
    name="cache",
    help="Embeddings of texts that were encoded before: what is kept, and deleting it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@app.command("ls")
def list_texts(as_json: AsJson = False) -> None:
    """What is kept, the last used first: size, age since its last use, name, text.

    \b
    lowvram cache ls
    """
    from lowvram import embeds_cache

    entries = embeds_cache.list_entries()
    limit, folder = embeds_cache.limit_bytes(), embeds_cache.cache_folder()
    total = sum(entry.bytes for entry in entries)
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "bytes": total,
                "limit_bytes": limit,
                "entries": [entry.to_json() for entry in entries],
            }
        )
        return
    now = time.time()
    for entry in entries:
        how = f"{entry.weights} {entry.dtype} {entry.device}"
        text = " ".join(entry.text.split())[:60] or "(no text)"
        size = f"{entry.bytes / 1e3:9,.1f} kB"
        print(f"{size}  {_age(now - entry.used):>5}  {entry.name}  {how}  {text}")
    bound = f"at most {limit / 1e6:,.0f} MB" if limit else "turned off"
    print(f"{total / 1e6:9,.1f} MB  in {folder}, {bound}")


@app.command("rm")
def remove(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="As cache ls shows it.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All that is kept.")] = False,
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", help="Not used for so long: 12h, 30d, 4w."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Delete what is kept: one text, all, or what was not used for some time.

    \b
    lowvram cache rm --older-than 30d
    lowvram cache rm --all
    """
    from lowvram import embeds_cache

    if (name is not None) + every + (older_than is not None) != 1:
        raise errors.RequestError("say what to delete: NAME, --all or --older-than 30d")
    seconds = None if older_than is None else _seconds(older_than)
    count, freed = embeds_cache.remove(name, seconds)
    if as_json:
        print_json({"removed": count, "freed_bytes": freed})
    else:
        print(f"deleted {count} texts, {freed / 1e6:,.1f} MB")


def _seconds(text: str) -> float:
    match = re.fullmatch(r"\s*(\d{1,6})\s*([mhdw])\s*", text.lower())
    if match is None:
        raise errors.RequestError(f"--older-than {text!r} is no time: for example 12h, 30d or 4w")
    return float(match[1]) * _SECONDS[match[2]]


def _age(seconds: float) -> str:
    unit = next((unit for unit in "wdhm" if seconds >= _SECONDS[unit]), "")
    return f"{seconds / _SECONDS[unit]:.0f} {unit}" if unit else "now"
