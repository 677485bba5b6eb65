"""The command that answers what another way of working costs. It takes the arguments of `run`."""

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from lowvram.cli.options import AsJson, InProcess
from lowvram.cli.output import print_json, showing_progress
from lowvram.cli.run import for_run, run
from lowvram.cli.words import parse_list
from lowvram.compare.variants import AXES

# What is varied instead of set once; the others of `run` are about its output.
_OTHER = {
    "output": None,
    "in_process": False,
    "as_json": False,
    "prompts_file": None,
    "cache": False,
    "image": None,
    "sample_seed": None,
    "checkpoint_every": 0,
    "preview": 0,
    "refine": False,
    "refine_strength": None,
    "refiner": "",
}
_SWAPS = ("transformer", "vae", "text_encoder")
_VARIED = {
    "encoder_weights": "Text encoders to compare",
    "transformer_weights": "Transformers to compare",
    "pixels": "Ways to decode to compare",
    "dtype": "Dtypes to compare",
}
_AXIS = {"pixels": "decode"}  # the others go by the name of run's option


def compare(
    prompts: list[str], output: Path, in_process: bool, as_json: bool, **given: Any
) -> None:
    """The same pictures in several ways of working: how they differ, and what each way takes.

    \b
    lowvram compare "a red heart" -m demo --weights whole,8bit,4bit -o compared
    lowvram compare "a cat" "a dog" --seed 1-4 --decode whole,strips,blended -o compared

    Give two or more, with commas, to at least one of --weights, --transformer-weights, --decode
    and --dtype. The first of each is the reference, which all others differ from in one thing.
    Writes sheet.png, comparison.html, comparison.json and the files of all stages into a folder;
    what an interrupted comparison left there is used again. The other arguments are those of run.
    """
    from lowvram.compare.comparison import compare as carry_out

    vary: dict[str, list[str]] = {}
    for name in _VARIED:
        axis = _AXIS.get(name, name)
        values = parse_list(AXES[axis][1], given[name])
        given[name] = "auto"
        if values:
            vary[axis] = values
    model, revision = given["model"], given["revision"]
    given = _OTHER | given
    options = {
        name: value
        for name, value in for_run(given).items()
        if name not in AXES and name not in _OTHER
    }
    with showing_progress(loads_here=in_process) as on_progress:
        result = carry_out(
            prompts,
            model,
            output,
            vary=vary,  # type: ignore[arg-type]
            revision=revision,
            in_process=in_process,
            on_progress=on_progress,
            **{name: given[name] for name in _SWAPS},
            **options,
        )
    if as_json:
        print_json(result.to_json())
    else:
        print(f"{result.sheet}\n{result.page}\n{result.document}\n\n{result.table()}")


def _signature() -> inspect.Signature:
    """The arguments of `run`, with lists for what is varied, and a folder for the output."""
    shared = [p for name, p in inspect.signature(run).parameters.items() if name not in _OTHER]
    place = next(index for index, p in enumerate(shared) if p.name == "encoder_weights")
    kept = [p for p in shared if p.name not in _VARIED]
    own = {
        "output": (_output(), inspect.Parameter.empty),
        **{n: (_listed(n), None) for n in _VARIED},
    }
    last: dict[str, tuple[Any, Any]] = {
        "in_process": (InProcess, False),
        "as_json": (AsJson, False),
    }
    made = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in (own | last).items()
    ]
    ordered = kept[:place] + made[: len(own)] + kept[place:] + made[len(own) :]
    return inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in ordered])


def _output() -> Any:
    return Annotated[Path, typer.Option("--output", "-o", help="Folder for all that is made.")]


def _listed(name: str) -> Any:
    _, option, values = AXES[_AXIS.get(name, name)]
    text = f"{_VARIED[name]}, the reference first: {','.join(values)}."
    return Annotated[str | None, typer.Option(option, metavar="LIST", help=text)]


compare.__signature__ = _signature()  # type: ignore[attr-defined]
compare.__annotations__ = {p.name: p.annotation for p in _signature().parameters.values()}
