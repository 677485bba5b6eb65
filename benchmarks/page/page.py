"""The whole page: goals, a section for each result file, and what was not measured."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cpu_rows import rows_of
from benchmarks.page import gpu
from benchmarks.page.goals import goals_table, unmeasured
from benchmarks.page.sections import SECTIONS

HEADER = """\
# Measured side by side

Written by `scripts/benchmarks_page.py` from the files in [results/](results): measure again, then run
`scripts/check --fix`. Nothing here was typed in by hand. GB and MB are decimal. An out-of-memory
and a contender that cannot work are rows, not gaps.

`benchmarks/cpu.sh` and `benchmarks/gpu.sh` run the comparisons, `benchmarks/baselines/` has the
contenders, `benchmarks/micro/` measures parts alone.
"""
_SIZES = (512, 1024, 2048, 4096)  # px
_PROMPTS = (1, 10, 100)
_BUDGETS = (8, 6, 4, 2, 1)  # GiB
_CONTENDERS = ("published-8bit", "published-4bit", "resident", "model-offload",
               "sequential-offload", "group-offload-block", "group-offload-leaf",
               "model-offload-tiling", "model-offload-slicing", "lowvram")  # fmt: skip

Results = Mapping[str, Mapping[str, Any]]


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Every result file by its name.

    Raises:
        ValueError: a file that is no JSON, or that no section shows.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path.name} is no JSON: measure again ({error})") from None
    strange = set(found) - {section.name for section in SECTIONS}
    if strange:
        raise ValueError(f"{', '.join(sorted(strange))}: no section in benchmarks/page shows it")
    return found


def page(results: Results) -> str:
    """The page as Markdown."""
    sections = [
        section.text(results[section.name]) for section in SECTIONS if section.name in results
    ]
    goals = "## Goals\n\n1024 px, 20 steps, guidance, same weights.\n\n" + goals_table(results)
    missing = "".join(f"- {line}\n" for line in not_measured(results))
    last = f"## Not measured\n\n{missing or 'Nothing is missing.'}"
    return "\n".join([HEADER, goals, *sections, last])


def not_measured(results: Results) -> Iterator[str]:
    """A line for each thing without a figure."""
    for section in SECTIONS:
        if section.name not in results:
            yield f"{section.title} (results/{section.name}.json is missing): {section.shows}"
    for goal in unmeasured(results):
        yield f"goal: {goal}"
    yield from _of_gpu(gpu.rows_of(results.get("gpu", {})).values())
    measured = results.get("cpu", {}).get("rows") or {}
    missing = [key for key in rows_of("full") if key not in measured]
    if missing:
        yield "on a CPU: " + ", ".join(f"`{key}`" for key in missing)


def _of_gpu(found: Any) -> Iterator[str]:
    """Of what shall be compared on a GPU: what no row has, whether it went well or not."""
    rows = [row for row in found if row.get("contender")]
    names = {row["contender"] for row in rows}
    ours = [row for row in rows if row["contender"] == gpu.OURS]
    limits = {row.get("budget_bytes") or row.get("limit_bytes") for row in ours}
    wanted = {
        "contenders": [each for each in _CONTENDERS if each not in names],
        "sizes": [f"{each} px" for each in _SIZES if each not in {row.get("size") for row in rows}],
        "numbers of prompts": [
            str(each) for each in _PROMPTS if each not in {row.get("pictures") for row in rows}
        ],
        "budgets": [f"{each} GiB" for each in _BUDGETS if each << 30 not in limits],
    }
    for what, absent in wanted.items():
        if absent:
            yield f"on a GPU, {what}: {', '.join(absent)}"
