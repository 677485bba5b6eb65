"""The rows of benchmarks/cpu.py: which contenders and stages, with what, on which networks."""

import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.baselines.contenders import CONTENDERS as ALL
from benchmarks.baselines.request import GUIDANCE, first_prompts
from benchmarks.side_by_side.places import finished

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a large blue star on a yellow background"
REFERENCE = "one-shot-fp32"
# The others' pictures are compared with the first one's. "reference" is for GPUs.
CONTENDERS = (REFERENCE, *(name for name in ALL if name not in (REFERENCE, "reference")))
_MANY = (REFERENCE, "published-8bit", "resident", "lowvram")  # --quick makes ten pictures of
_SIZES = {"demo": 128, "tiny": 128, "true": 512}  # side of the picture, px
_STEPS = {"demo": 20, "tiny": 2, "true": 2}
# Of tensors. The demo model's transformer holds 24.3 MB whole and 11.6 MB streamed
# (benchmarks/results/prediction.json).
_BUDGETS = {"demo": ("24MB", "16MB", "12MB", "8MB"), "tiny": (), "true": ("1GiB", "0.27GB")}

_READS = {"denoise": ("encode", "embeds"), "decode": ("denoise", "latents")}  # and who makes it

Part = Literal["demo", "tiny", "true"]


@dataclass(frozen=True)
class Row:
    """One process.

    Attributes:
        kind: "contender", "run" (the product's own command), "stage" or "interpreter".
        arguments: of `python -m`, with {model}, {output}, {embeds} and {latents} for places.
        cold: whether the weights are read from the disk, and not from the page cache.
    """

    key: str
    part: Part
    kind: str
    name: str
    arguments: tuple[str, ...]
    cold: bool

    def filled(self, place: "Place") -> list[str]:
        """The arguments with the places in them."""
        places = {"model": place.model(self.part), "output": place.output(self.key)}
        places |= place.between(self.part)
        return [argument.format_map(places) for argument in self.arguments]

    def shown(self) -> str:
        """The command for people, places left open."""
        words = shlex.join(self.arguments).replace("'{", "{").replace("}'", "}")
        return words if self.arguments[0] == "lowvram" else f"python -m {words}"


def rows_of(which: Literal["quick", "full"]) -> dict[str, Row]:
    """Rows by key, in the order in which they run: later ones need files of earlier ones."""
    found = list(_demo(which))
    found += _stages("tiny", few=True) if which == "quick" else []
    found += [*_stages("true"), *_true_contenders()] if which == "full" else []
    return {row.key: row for row in found}


def _demo(which: str) -> Iterator[Row]:
    bare = ("benchmarks.side_by_side.interpreter", "--device", "cpu")
    yield Row("demo/interpreter", "demo", "interpreter", "libraries, no weights", bare, cold=False)
    for count in (1, 10) if which == "quick" else (1, 10, 100):
        for contender in CONTENDERS if count < 10 or which == "full" else _MANY:
            yield _contender("demo", contender, count)
    yield _run("demo", None)
    budgets = _BUDGETS["demo"]
    for budget in budgets[1:3] if which == "quick" else budgets:
        yield _run("demo", budget)


def _true_contenders() -> Iterator[Row]:
    """End to end at 512 px; what does not fit into the memory is stopped, and that is its row."""
    for contender in (REFERENCE, "published-8bit", "published-4bit", "resident"):
        yield _contender("true", contender, 1)
    for budget in (None, *_BUDGETS["true"]):
        yield _run("true", budget)


def _contender(part: Part, name: str, count: int) -> Row:
    arguments = ["benchmarks.baselines", name, "--model", "{model}", "--output", "{output}"]
    arguments += ["--prompts", str(count), "--size", str(_SIZES[part]), "--device", "cpu"]
    arguments += ["--steps", str(_STEPS[part]), "--dtype", "fp32"]
    key = f"{part}/{name}/n{count}"
    return Row(key, part, "contender", name, tuple(arguments), cold=part == "true")


def _run(part: Part, budget: str | None) -> Row:
    """`lowvram` as it works by itself, in a budget for tensors or in none."""
    side = _SIZES[part]
    arguments = ["lowvram", "run", first_prompts(1)[0], "-m", "{model}", "-o"]
    arguments += ["{output}/picture-000.png", "--size", f"{side}x{side}", "--no-binning"]
    arguments += ["--steps", str(_STEPS[part]), "--seed", "0", "--guidance", str(GUIDANCE)]
    arguments += ["--no-clean", "--no-cache", "--device", "cpu", "--json"]
    arguments += ["--stage-budget", budget] if budget else []
    key, name = f"{part}/lowvram-{budget or 'defaults'}/n1", f"lowvram, {budget or 'its defaults'}"
    return Row(key, part, "run", name, tuple(arguments), cold=part == "true")


def _stages(part: Part, few: bool = False) -> Iterator[Row]:
    """Each stage of the product in each way, by its command line."""
    encode = ("encode", PROMPT, "-m", "{model}", "-o", "{embeds}", "--no-cache", "--weights")
    denoise = ("denoise", "{embeds}", "--steps", str(_STEPS[part]), "-o", "{latents}", "--weights")
    decode = ("decode", "{latents}", "-o", "{picture}", "--decode")
    budget = "--stage-budget"
    ways: dict[str, tuple[str, ...]] = {
        "encode-whole": (*encode, "whole"),
        "encode-8bit": (*encode, "8bit"),
        "encode-4bit": (*encode, "4bit"),
        "encode-stream": (*encode, "stream"),
        "encode-stream-0.25GB": (*encode, "stream", budget, "0.25GB"),
        "denoise-whole": (*denoise, "whole"),
        "denoise-stream": (*denoise, "stream"),
        "denoise-stream-0.27GB": (*denoise, "stream", budget, "0.27GB"),
        "decode-whole": (*decode, "whole"),
        "decode-strips": (*decode, "strips"),
    }
    if few:  # one way of each stage
        ways = {name: ways[name] for name in ("encode-stream", "denoise-stream", "decode-strips")}
    for name, arguments in ways.items():
        command = ("lowvram", *arguments, "--json")
        yield Row(f"{part}/stage/{name}", part, "stage", name.replace("-", " "), command, True)


class Place:
    """Where the checkpoints and what is made of them lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def model(self, part: Part) -> Path:
        """The demo model is in the package."""
        if part == "demo":
            return ROOT / "lowvram" / "demo" / "model"
        size = "published" if part == "true" else "tiny"
        return self.folder / f"pixart-sigma-512-{size}-bfloat16"

    def make(self, part: Part, say: Callable[[str], None]) -> str | None:
        """Make the checkpoint where it is not there yet. Why it cannot be; None where it is."""
        if part == "demo":
            return None
        model = self.model(part)
        if finished(model):
            return None
        say(f"checkpoint {model.name} …")
        command = [sys.executable, "-m", "scripts.make_checkpoint", str(model)]
        command += ["--sample-size", "64" if part == "true" else "16", "--dtype", "bfloat16"]
        command += ["--size", "published" if part == "true" else "tiny"]
        made = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
        return f"no checkpoint: exit code {made.returncode}" if made.returncode else None

    def between(self, part: Part) -> dict[str, Path]:
        """The files that the stages leave for each other."""
        folder = self.folder / "cpu" / f"{part}-stages"
        folder.mkdir(parents=True, exist_ok=True)
        names = ("x.embeds.safetensors", "x.latents.safetensors", "x.png")
        return dict(zip(("embeds", "latents", "picture"), (folder / n for n in names), strict=True))

    def lacks(self, row: Row) -> str | None:
        """The rows of which one has to run before this one; None where it needs none."""
        command = row.arguments[1]
        maker, file = _READS.get(command, ("", "")) if row.kind == "stage" else ("", "")
        if not file or self.between(row.part)[file].is_file():
            return None
        return f"{row.part}/stage/{maker}-*"

    def output(self, key: str) -> Path:
        """Where the pictures of a row go."""
        folder = self.folder / "cpu" / key.replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def emptied(self, key: str) -> Path:
        """The same without what an earlier run has left: it must not be taken for this one's."""
        folder = self.output(key)
        for path in folder.iterdir():
            path.unlink()
        return folder

    def reference(self, row: Row) -> Path | None:
        """The fp32 one-shot pipeline's pictures of as many prompts; None where there are none."""
        if row.kind in ("stage", "interpreter") or row.name == REFERENCE:
            return None
        count = row.key.split("/")[2]
        return self.output(f"{row.part}/{REFERENCE}/{count}")

    def without_paths(self, text: str) -> str:
        """Errors name files: without the folders, which are this machine's."""
        return text.replace(str(self.folder), "FOLDER").replace(str(ROOT), ".")
