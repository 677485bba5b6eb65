"""Run one contender and print what it took as one line of JSON.

    python -m benchmarks.baselines model-offload --model FOLDER --size 1024 --output out

Fields: `contender`; `ok`; `error` (null, "out of memory at STAGE" or "cannot: REASON"); `stages`, a
row for each and "all" last, with `seconds`, `peak_allocated_bytes` (tensors), `peak_reserved_bytes`
(the caching allocator), `peak_process_bytes` (the driver's count of this process),
`peak_rss_bytes` (resident in RAM), `peak_anonymous_bytes` (of it what no file stands behind),
`read_bytes` (what a disk had to give), each null where it cannot be had;
`seconds_to_first_picture` (from the start of the process), `seconds_per_further_picture`;
`pictures`, `size` (px), `steps`, `outputs`, `versions`, `limit_bytes`.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.baselines.contenders import CONTENDERS
from benchmarks.baselines.outcome import Failed, Outcome, error_of
from benchmarks.baselines.request import DTYPES, Request, first_prompts
from benchmarks.machine import versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Always 0: a contender that cannot is a row too."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    request = parse(arguments)
    request.output.mkdir(parents=True, exist_ok=True)
    row = carry_out(request) | {"versions": versions()}
    answer.write(json.dumps(row, separators=(",", ":")) + "\n")
    answer.close()
    return 0


def parse(arguments: Sequence[str] | None) -> Request:
    """The command line as a request."""
    parser = argparse.ArgumentParser(prog="benchmarks.baselines", description="One contender.")
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--model", type=Path, required=True, help="folder in diffusers layout")
    parser.add_argument("--prompts", type=int, default=1, metavar="N", help="of the fixed list")
    parser.add_argument("--size", type=int, default=1024, metavar="PX")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit", type=int, metavar="BYTES", help="of the process on the card")
    parser.add_argument("--budget", default="none", metavar="BYTES|none", help="lowvram's --vram")
    parser.add_argument("--stage-budget", type=int, metavar="BYTES", help="of lowvram's stages")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp16 (one-shot-fp32: fp32)")
    parser.add_argument("--output", type=Path, default=Path("outputs") / "baselines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latents", type=Path, help="finished ones: decode only")
    given = vars(parser.parse_args(arguments))
    given["prompts"] = first_prompts(given["prompts"])
    given["budget"] = None if given["budget"] == "none" else int(given["budget"])
    given["dtype"] = given["dtype"] or ("fp32" if given["contender"] == "one-shot-fp32" else "fp16")
    for path in ("model", "output"):
        given[path] = given[path].resolve()
    return Request(**given)


def carry_out(request: Request) -> dict[str, Any]:
    """The contender's row."""
    row: dict[str, Any] = {"contender": request.contender, "ok": False, "error": None}
    row |= {"stages": [], "seconds_to_first_picture": None, "seconds_per_further_picture": None}
    row |= {"pictures": len(request.prompts), "size": request.size, "steps": request.steps}
    row |= {"dtype": request.dtype, "outputs": {}}
    row |= {"limit_bytes": request.limit, "budget_bytes": request.budget}
    row |= {"stage_budget_bytes": request.stage_budget}
    module = importlib.import_module(f"benchmarks.baselines.{CONTENDERS[request.contender]}")
    try:
        made = module.run(request) if request.contender == "lowvram" else _here(request, module)
    except _Ended as ended:
        return row | {"error": ended.error, "stages": ended.rows}
    except Failed as error:
        return row | {"error": str(error)}
    row |= {"ok": True, "stages": made.rows}
    row |= {"seconds_to_first_picture": made.seconds_to_first()}
    row |= {"seconds_per_further_picture": made.seconds_per_further()}
    latents = None if made.latents is None else str(made.latents)
    return row | {"outputs": {"latents": latents, "pixels": str(made.pictures[0])}}


class _Ended(Exception):
    """A contender that failed in this process, with the rows until then."""

    def __init__(self, error: str, rows: list[dict[str, Any]]) -> None:
        super().__init__(error)
        self.error, self.rows = error, rows


def _here(request: Request, module: Any) -> Outcome:
    """Run a contender in this process, capped and measured."""
    from benchmarks.baselines.measure import Stages, cap, together
    from lowvram.terminal import quiet_libraries

    quiet_libraries()
    import torch

    device, started = torch.device(request.device), psutil.Process().create_time()
    if request.device == "cuda" and request.limit is not None:
        cap(device, request.limit)
    stages, error = Stages(device), None
    try:
        module.run(request, stages)
    except Exception as problem:  # one row of a table, whatever it is
        error = error_of(problem, stages.now)
    seconds, rows = time.time() - started, stages.close()
    rows.append({"name": "all", **together(rows), "seconds": seconds})
    if error is not None:
        raise _Ended(error, rows)
    count = 1 if request.latents else len(request.prompts)
    kept = None if request.latents else request.output / "latents.safetensors"
    return Outcome(rows, started, [request.picture(index) for index in range(count)], kept)


if __name__ == "__main__":
    sys.exit(main())
