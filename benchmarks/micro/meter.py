"""What the meter's sampling costs the work that it measures.

    nice python benchmarks/micro/meter.py

Two kinds of work, with and without sampling by turns in one process: large matrix products, beside
which a thread is free, and small operations, which need the interpreter all the time. Looks are
taken 20 times as often as in a stage and without their own limit, and what that costs is divided
by 20: less is lost in the noise of a shared machine. Told are the thread's share in processor time,
and by how much the work takes longer, median and quartiles.
The last line is one compact JSON, which also goes to `benchmarks/results/micro_meter.json`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

from benchmarks.machine import recorded, save  # noqa: E402
from lowvram.memory import timeline  # noqa: E402
from lowvram.memory.meter import Meter  # noqa: E402
from lowvram.memory.timeline import INTERVAL_SECONDS, MOST_ROWS  # noqa: E402

CPU = torch.device("cpu")
HASTE = 20


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="What sampling costs.")
    parser.add_argument("--repeats", type=int, default=10, help="pairs (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each piece of work, about")
    options = parser.parse_args()
    timeline._MOST_OVERHEAD = 1.0  # by which a stage's meter limits itself to 1 %
    document = {
        "benchmark": "micro_meter",
        **recorded(),
        "interval_seconds": INTERVAL_SECONDS,
        "most_rows": MOST_ROWS,
        "look_microseconds": look_seconds() * 1e6,
        "work": {
            name: compared(work, options.seconds, options.repeats)
            for name, work in (("large products", large_products), ("small operations", small))
        },
    }
    save("micro_meter", document)
    print(json.dumps(document, separators=(",", ":")))
    return 0


def look_seconds(times: int = 2000) -> float:
    """Processor seconds of one look at every counter."""
    meter = Meter(CPU)
    started = time.thread_time()
    for _ in range(times):
        meter.sample()
    return (time.thread_time() - started) / times


def large_products(count: int) -> None:
    """Large matrix products."""
    a = torch.ones(1024, 1024)
    for _ in range(count):
        a.mm(a)


def small(count: int) -> None:
    """Operations that take a microsecond."""
    a = torch.ones(8)
    for _ in range(count * 1000):
        a.add(a)


def compared(work: Callable[[int], None], seconds: float, repeats: int) -> dict[str, object]:
    """The work with sampling to the work without, in pairs, and the thread's share.

    (ratio - 1) / HASTE is the cost at the interval of a stage.
    """
    count = counted(work, seconds)
    ratios, shares, looks = [], [], 0
    for repeat in range(repeats):
        took = {}
        for sampled in (False, True) if repeat % 2 else (True, False):
            meter = Meter(CPU, interval_seconds=INTERVAL_SECONDS / HASTE)
            started = time.perf_counter()
            with meter if sampled else nullcontext():
                work(count)
            took[sampled] = time.perf_counter() - started
            if sampled:
                shares.append(meter.sampler.busy_seconds / took[True])
                looks += meter.sampler.looks
        ratios.append(took[True] / took[False])
    lower, median, upper = ((q - 1) / HASTE for q in statistics.quantiles(ratios, n=4))
    return {
        "thread_share": statistics.median(shares) / HASTE,
        "overhead": {"lower": lower, "median": median, "upper": upper},
        "pairs": repeats,
        "looks": looks,
    }


def counted(work: Callable[[int], None], seconds: float) -> int:
    """How much of a work takes about so long."""
    work(10)
    started = time.perf_counter()
    work(20)
    return max(1, round(20 * seconds / (time.perf_counter() - started)))


if __name__ == "__main__":
    raise SystemExit(main())
