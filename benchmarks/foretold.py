"""The least that each stage can work in on a CUDA card, foretold: no card is needed.

    nice python benchmarks/foretold.py

True sizes from the published configurations, guidance, one picture, nothing quantised and no tile
blended. For each stage the smallest `--stage-budget` that the planner accepts is looked for, in
steps of 1 MiB, and what the stage would hold then is written down. On an H100 what was held was
within 1 % of what is foretold for networks, and 5 to 7 % over it for strips in float16, before an
allowance was made (docs/log.md). Results go to `benchmarks/results/foretold.json`; the last line on
stdout is one compact JSON. And for cards of several sizes: what the planner takes at 1024 px.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

from benchmarks.machine import recorded, save  # noqa: E402
from lowvram.errors import RequestError  # noqa: E402
from lowvram.families.pixart import FAMILY  # noqa: E402
from lowvram.repository import resolve  # noqa: E402
from lowvram.request.run import resolve_run  # noqa: E402
from lowvram.stages import plan as planning  # noqa: E402
from scripts.make_checkpoint import make_checkpoint  # noqa: E402

PROMPT = "a small cactus with a happy face in the Sahara desert"
SIDES = (512, 1024, 2048, 4096)  # px
CARDS = (8, 6, 5, 4, 3, 2, 1)  # GiB that the process may take
STAGES = ("encode", "denoise", "decode")
_HELD = ("peak_allocated_bytes", "peak_reserved_bytes")
_AMPLE = 80 << 30
_MIB = 1 << 20


def main() -> int:
    """Look for all of them, two at a time."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    document: dict[str, Any] = {"benchmark": "foretold", **recorded()}
    stages, sides = zip(*wanted(), strict=True)
    with TemporaryDirectory() as folder:
        skeleton(Path(folder))
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            cards = pool.map(partial(within, folder), CARDS)
            document["rows"] = list(pool.map(partial(least, folder), stages, sides))
            document["cards"] = [row for rows in cards for row in rows]
    save("foretold", document)
    brief = {f"{row['stage']}/{row['side']}": row["budget_bytes"] for row in document["rows"]}
    print(json.dumps({"benchmark": "foretold", "rows": brief}, separators=(",", ":")))
    return 0


def skeleton(folder: Path) -> None:
    """A model of the published configurations; its weights are there by name only."""
    make_checkpoint(folder)
    for role in ("text_encoder", "transformer", "vae"):
        path = folder / FAMILY.component(role).subfolder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config | dict(FAMILY.published_configs[role])), encoding="utf-8")


def wanted() -> Iterator[tuple[str, int]]:
    """Stages and sides; a text is of no size."""
    yield "encode", 0
    for side in SIDES:
        yield "denoise", side
        yield "decode", side


def least(model: str, stage: str, side: int) -> dict[str, Any]:
    """The smallest budget of a stage, and what it would do and hold in it."""
    low, high = 0, _AMPLE // _MIB  # does not do, does
    found = planned(model, stage, side, high)
    assert found is not None
    while high - low > 1:
        # What the last way would hold is often all that it needs, and less than half of the rest.
        told = found.predicted
        held = max(told["peak_allocated_bytes"], told["peak_reserved_bytes"])
        half, hint = (low + high) // 2, -(-held // _MIB)
        middle = hint if low < hint < half else half
        tried = planned(model, stage, side, middle)
        if tried is None:
            low = middle
        else:
            high, found = middle, tried
    print(f"foretold: {stage} {side or ''}: {high} MiB, {found.way}", file=sys.stderr, flush=True)
    return {
        "stage": stage,
        "side": side,
        "budget_bytes": high * _MIB,
        "way": found.way,
        "predicted": {name: found.predicted[name] for name in _HELD},
    }


def within(model: str, gibibytes: int) -> list[dict[str, Any]]:
    """What each stage would do at 1024 px where the process may take so much (`--vram`)."""
    tasks = resolve_run([PROMPT], resolve(model), Path("x.png"), device="cpu", size=(1024, 1024),
                        vram=gibibytes << 30)  # fmt: skip
    rows = planning.plan(tasks, torch.device("cuda"))
    return [
        {
            "vram_bytes": gibibytes << 30,
            "stage": row.stage,
            "way": row.way,
            "predicted": {name: row.predicted[name] for name in (*_HELD, "peak_process_bytes")},
        }
        for row in rows
    ]


def planned(model: str, stage: str, side: int, mebibytes: int) -> planning.Row | None:
    """What a stage would do with a budget; None where it does not fit."""
    size = (side or 1024,) * 2
    tasks = resolve_run([PROMPT], resolve(model), Path("x.png"), device="cpu", size=size,
                        binning=False, stage_budget=_AMPLE)  # fmt: skip
    bounded = replace(tasks.by_stage()[stage], stage_budget=mebibytes * _MIB)
    tasks = replace(tasks, **{stage: bounded})  # type: ignore[arg-type]
    try:
        rows = planning.plan(tasks, torch.device("cuda"))
    except RequestError:
        return None
    return next(row for row in rows if row.stage == stage)


if __name__ == "__main__":
    sys.exit(main())
