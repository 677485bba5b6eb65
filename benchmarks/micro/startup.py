"""How long a person waits before anything happens: starts of Python and of the command line.

    nice python benchmarks/micro/startup.py

Seconds of whole processes, by turns, medians of several; the least of them is what an idle machine
would give. "a first stage" is what encode imports before it can build a network; everything is in
the page cache from the second round on. The last line is one compact JSON, which also goes to
`benchmarks/results/micro_startup.json`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

from benchmarks.machine import recorded, save  # noqa: E402

QUICK = {  # what to show for it, and the arguments of Python
    "python -c pass": ("-c", "pass"),
    "import lowvram": ("-c", "import lowvram"),
    "lowvram --help": ("-m", "lowvram", "--help"),
    "lowvram run --help": ("-m", "lowvram", "run", "--help"),
}
IMPORTS = {
    "import torch": ("-c", "import torch"),
    "a first stage's imports": (
        "-c",
        "from lowvram.weights.checkpoint import find_class as f; f('transformers.T5EncoderModel')",
    ),
    "lowvram plan, the demo model": ("-m", "lowvram", "plan", "a star", "-m", "demo"),
}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Seconds of starting.")
    parser.add_argument("--repeats", type=int, default=5, help="of each (default: %(default)s)")
    parser.add_argument("--slow-repeats", type=int, default=2, help="where torch is imported")
    options = parser.parse_args()
    document = {"benchmark": "micro_startup", **recorded()}
    rows = timed(QUICK, options.repeats) | timed(IMPORTS, options.slow_repeats)
    document["rows"] = {
        name: {"median_seconds": statistics.median(each), "seconds": each}
        for name, each in rows.items()
    }
    save("micro_startup", document)
    print(json.dumps(document, separators=(",", ":")))
    return 0


def timed(commands: dict[str, tuple[str, ...]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, by turns."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, arguments in commands.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
            seconds[name].append(round(time.perf_counter() - started, 4))
    return seconds


if __name__ == "__main__":
    sys.exit(main())
