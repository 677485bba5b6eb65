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

Written by `scripts/benchmarks_page.py` from the files in [results/](results): measure again, then
run `scripts/check --fix`. Nothing here was typed in by hand. GB and MB are decimal. An
out-of-memory and a contender that cannot work are rows, not gaps.

`benchmarks/cpu.sh` and `benchmarks/gpu.sh` run the comparisons, `benchmarks/baselines/` has the
contenders, `benchmarks/micro/` measures parts alone.
"""
_WANTED = {  # on a GPU
    "contenders": ("published-8bit", "published-4bit", "resident", "model-offload",
                   "sequential-offload", "group-offload-block", "group-offload-leaf",
                   "model-offload-tiling", "model-offload-slicing", "lowvram"),
    "sizes": ("512 px", "1024 px", "2048 px", "4096 px"),
    "numbers of prompts": ("1", "10", "100"),
    "budgets": ("8 GiB", "6 GiB", "4 GiB", "2 GiB", "1 GiB"),
    "page cache": ("cold", "warm"),
}  # fmt: skip

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
    yield from _of_gpu(gpu.entries(results.get("gpu", {})))
    measured = results.get("cpu", {}).get("rows") or {}
    missing = [key for key in rows_of("full") if key not in measured]
    if missing:
        yield "on a CPU: " + ", ".join(f"`{key}`" for key in missing)


def _of_gpu(found: list[gpu.Entry]) -> Iterator[str]:
    """Of what shall be compared on a GPU: what no row has, whether it went well or not."""
    ours = [entry for entry in found if entry.what == gpu.OURS]
    have = {
        "contenders": {entry.what for entry in found},
        "sizes": {f"{entry.size} px" for entry in found},
        "numbers of prompts": {str(entry.pictures) for entry in found},
        "budgets": {f"{entry.bounds.get('budget', 0) / (1 << 30):g} GiB" for entry in ours},
        "page cache": {entry.cache for entry in found},
    }
    for what, wanted in _WANTED.items():
        absent = [each for each in wanted if each not in have[what]]
        if absent:
            yield f"on a GPU, {what}: {', '.join(absent)}"
