"""Measured side by side on one CUDA GPU, without network: `benchmarks/gpu.sh PART...`.

    benchmarks/gpu.sh checkpoint            the random checkpoint of true size (22 GB), once
    benchmarks/gpu.sh memory predicted      peaks, no seconds: side by side where there is room
    benchmarks/gpu.sh first many            seconds: one after the other, alone on the machine
    benchmarks/gpu.sh first --quick --seconds 120
    benchmarks/gpu.sh memory --rows interpreter reference lowvram

A call ends after `--seconds`, all its parts together: rows under way are stopped then and say
nothing. By the rows of an earlier run, `checkpoint prepared memory predicted --quick` and then
`first throttled streaming many --quick` take an H100 some seven minutes each. The most telling rows
of a part come first. Parts run alone and in any order; outputs are held against what rows before
have left.

Each row goes into `benchmarks/results/gpu.json` as soon as it is measured (side_by_side/rows.py
says what it replaces). An out-of-memory is a row. Without a CUDA GPU it says so and exits with 2;
`--device cpu --size-of-model tiny` tries every part without one (into the folder, never into the
results; nothing prepared is used there, since a CPU computes in float32).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

from benchmarks.machine import machine, versions  # noqa: E402
from benchmarks.page.goals import goals_table  # noqa: E402
from benchmarks.side_by_side.parts import PARTS, SIDES  # noqa: E402
from benchmarks.side_by_side.places import is_made  # noqa: E402
from benchmarks.side_by_side.processes import python  # noqa: E402
from benchmarks.side_by_side.rows import Plan, Store, is_result  # noqa: E402
from benchmarks.side_by_side.running import IN_ONE_PROCESS, Runner  # noqa: E402
from benchmarks.side_by_side.table import brief, table  # noqa: E402

NO_DEVICE = 2  # exit code
_BASE = 1024  # px of the checkpoint whose files are written
_TINY = 8  # by how much smaller the pictures of the tiny model are
_FREE_BYTES = 24e9  # for the checkpoint
_JOBS = 4
# What a row may take, on the card without a cap and in RAM with the weights' files: up to 12.4 and
# 31.5 GB in results/gpu.json.
_CARD_BYTES, _RAM_BYTES = 20e9, 32e9


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 2 where there is no GPU, 1 where the checkpoint cannot be made."""
    options = _parse(arguments)
    about = {"machine": machine(), "versions": versions()}
    if options.device == "cuda" and about["machine"]["gpu"] is None:
        print("gpu: no CUDA GPU here: use --device cpu --size-of-model tiny to try the benchmark")
        return NO_DEVICE
    ends = time.monotonic() + options.seconds
    tiny = options.size_of_model == "tiny"
    folder = options.folder.resolve() / f"gpu-{options.size_of_model}"
    results = options.results or (folder if tiny else ROOT / "benchmarks" / "results")
    store = Store(results / "gpu.json", {**about, "model": options.size_of_model})

    def px(side: int) -> int:
        return side // _TINY if tiny else side

    sides = [px(side) for side in SIDES[:-1]]
    if not _checkpoint(options, folder, sides, px(_BASE), store):
        return 1
    parts = [name for name in options.parts if name != "checkpoint"]
    runner = Runner(folder, options.device, sides, px(_BASE), options.row_seconds, ends)
    jobs = options.jobs or 1
    if options.device == "cuda":
        runner.card = card_of(about["machine"], about["versions"])
        jobs = options.jobs or jobs_for(about["machine"])
    for name in parts:
        plans = chosen(list(PARTS[name](px, options.quick)), options.rows)
        run_part(name, plans, runner, store, jobs)
    print(table(store.rows, options.parts))
    print(goals_table({"gpu": store.document()}))
    mine = {k: row for k, row in store.rows.items() if k.partition("/")[0] in options.parts}
    print(json.dumps({"benchmark": "gpu", "rows": brief(mine)}, separators=(",", ":")))
    return 0


def card_of(machine: Mapping[str, Any], versions: Mapping[str, str]) -> tuple[str, ...]:
    """What names a card where lowvram remembers what was measured of it."""
    torch = versions["torch"].partition("+")[0]  # what it is built for is not always told
    return (str(machine["gpu"]), f"torch {torch}", f"driver {machine['driver']}")


def jobs_for(machine: Mapping[str, Any]) -> int:
    """How many rows without times run side by side: as many as card and RAM have room for."""
    room = min(machine["gpu_memory_bytes"] / _CARD_BYTES, machine["memory_bytes"] / _RAM_BYTES)
    return max(1, min(_JOBS, int(room)))


def chosen(plans: Sequence[Plan], texts: Sequence[str] | None) -> list[Plan]:
    """The plans whose key holds one of the texts, in the texts' order; all where none is given."""
    if texts is None:
        return list(plans)
    return list(dict.fromkeys(plan for text in texts for plan in plans if text in plan.key))


def run_part(name: str, plans: Sequence[Plan], runner: Runner, store: Store, jobs: int) -> None:
    """Measure a part's rows and keep them.

    When the time is over none is begun, and one that ends without a result says nothing.
    """

    def keep(plan: Plan, row: Mapping[str, Any], started: float) -> None:
        if runner.is_over() and not is_result(row):
            say(f"{plan.key}: no time left")
            return
        stays = "" if store.add(plan.key, row) else "; the earlier result stays"
        say(f"{plan.key}: {row['error'] or 'ok'}, {time.monotonic() - started:.1f} s{stays}")

    def one(plan: Plan) -> None:
        if not runner.is_over():
            started = time.monotonic()
            keep(plan, runner.measure(plan), started)

    if not plans or runner.is_over():
        say(f"{name}: {'no time left' if plans else 'no row has such a name'}")
        return
    if not runner.get_ready(plans):
        say("lowvram doctor did not measure the card: a context of 0.5 GB is assumed")
    if name in IN_ONE_PROCESS:
        started = time.monotonic()
        for plan, row in runner.measure_together(plans):
            keep(plan, row, started)
            started = time.monotonic()
    elif jobs > 1 and not any(plan.timed for plan in plans):
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, plans))
    else:
        for plan in plans:
            one(plan)


def say(line: str) -> None:
    """What is going on, for people."""
    print(f"gpu: {line}", file=sys.stderr, flush=True)


def _checkpoint(
    options: argparse.Namespace, folder: Path, sides: Sequence[int], base: int, store: Store
) -> bool:
    """Make the checkpoint if it is not there; whether it is there now."""
    if is_made(folder, sides, base):
        return True
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if options.size_of_model == "published" and free < _FREE_BYTES:
        say(f"{folder} has {free / 1e9:.0f} GB free, and the checkpoint takes 22: use --folder")
        return False
    command = python("benchmarks.side_by_side.checkpoint", str(folder), options.size_of_model)
    started = time.monotonic()
    ran = subprocess.run([*command, str(base), *map(str, sides)], cwd=ROOT, check=False)
    seconds, made = time.monotonic() - started, ran.returncode == 0
    size = sum(p.stat().st_size for p in folder.glob(f"sigma-{base}/*/*.safetensors"))
    row = {"ok": made, "error": None if made else "cannot: see above", "bytes": size}
    store.add("checkpoint/written", {**row, "wall_seconds": seconds, "timed": True})
    say(f"checkpoint: {size / 1e9:.1f} GB in {seconds:.0f} s")
    return made


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description="Measured on a GPU.")
    parser.add_argument("parts", nargs="+", choices=["checkpoint", *PARTS], metavar="PART",
                        help=", ".join(["checkpoint", *PARTS]))  # fmt: skip
    default = Path(os.environ.get("LOWVRAM_BENCHMARK_FOLDER") or ROOT / ".checkpoints")
    parser.add_argument("--folder", type=Path, default=default, help="for 36 GB (%(default)s)")
    parser.add_argument("--results", type=Path, help="folder (default: benchmarks/results)")
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="whose key holds one of these")
    parser.add_argument("--quick", action="store_true", help="the most telling rows only")
    parser.add_argument("--seconds", type=float, default=540, help="all of it may take")
    parser.add_argument("--row-seconds", type=float, default=240, help="a row may take")
    parser.add_argument("--jobs", type=int, help="rows without times side by side (default: up "
                        f"to {_JOBS} on a GPU, by its memory and RAM)")  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size-of-model", choices=("published", "tiny"), default="published")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and options.size_of_model == "published" and not options.results:
        parser.error("--device cpu measures no GPU: name a --results folder of its own")
    return options


if __name__ == "__main__":
    sys.exit(main())
