"""What the tests on a GPU measured, as a result file: `python benchmarks/cuda.py REPORT`.

    LOWVRAM_CUDA_REPORT=report.jsonl scripts/test tests/test_cuda.py tests/test_cuda_memory.py
    python benchmarks/cuda.py report.jsonl

Run both on one machine: it is recorded with the figures. Of equal measurements the last is kept.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

from benchmarks.machine import recorded, save  # noqa: E402

TESTS = ("foretold", "strips", "overlap", "cosine", "picture")  # that are figures
_NAMES = ("test", "role", "dtype", "size", "side", "budget", "way", "bits", "model")


def figures(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The measurements that belong on the page, sorted by what they are of."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        row = json.loads(line)
        if row["test"] in TESTS:
            found[key(row)] = row
    return [found[name] for name in sorted(found)]


def key(row: Mapping[str, Any]) -> str:
    """What a measurement is of."""
    return "/".join(f"{row[name]:>12}" for name in _NAMES if name in row)


def main() -> int:
    """Write benchmarks/results/cuda.json."""
    parser = argparse.ArgumentParser(description="Make cuda.json of what the tests noted.")
    parser.add_argument("report", type=Path, help="the file that LOWVRAM_CUDA_REPORT named")
    report = parser.parse_args().report
    rows = figures(report.read_text(encoding="utf-8").splitlines())
    document = {"benchmark": "cuda", **recorded(), "notes": [], "rows": rows}
    save("cuda", document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
