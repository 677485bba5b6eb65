"""What a figure depends on: the machine, the versions, the day and what else was running.

Every benchmark puts `recorded()` into its result file, so that benchmarks/README.md can say it.
Imports no torch: whatever is measured is not started here.
"""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LIBRARIES = ("torch", "transformers", "diffusers", "accelerate", "bitsandbytes", "safetensors")
OWN, COMMIT = "lowvram", "lowvram_commit"
_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what a CPU's speed in bf16 hangs on


def recorded() -> dict[str, Any]:
    """The four that every result file holds; to be called before anything is measured.

    `load_average_before` is that of the last minute: programs that waited for a processor.
    """
    return {
        "machine": machine(),
        "versions": versions(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "load_average_before": load_average(),
    }


def machine() -> dict[str, Any]:
    """The hardware; the last three are None where no NVIDIA driver answers."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        **_gpu(),
    }


def versions() -> dict[str, str]:
    """Of Python, of the libraries that are installed and of lowvram, with the commit of a checkout.

    Result files of earlier days have no lowvram among them.
    """
    found = {"python": platform.python_version()}
    for name in (*LIBRARIES, OWN):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | ({COMMIT: commit} if (commit := commit_of(ROOT)) else {})


@cache
def commit_of(folder: Path) -> str | None:
    """The commit that is checked out there, shortened; None where it is no checkout, or no git."""
    if not (folder / ".git").exists():  # git would look further up
        return None
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def load_average() -> float | None:
    """Of the last minute; None on Windows, which has none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def save(name: str, document: Mapping[str, Any], folder: Path = RESULTS) -> None:
    """Write `name`.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def save_rows(
    name: str, rows: Mapping[str, Mapping[str, Any]], folder: Path = RESULTS
) -> dict[str, Any]:
    """Merge rows by their key into `name`.json: new ones replace those of the same key.

    Each row has its own `recorded()`, since those of one file may come from several days.

    Returns:
        the document as it is written.
    """
    document = {"benchmark": name, "rows": {**saved_rows(name, folder), **rows}}
    save(name, document, folder)
    return document


def saved_rows(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """The rows of `name`.json; none where there is no such file."""
    path = folder / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return dict(found.get("rows", {}))


def _cpu() -> str:
    """Its name, and which vector instructions it has."""
    name, facts = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if not facts.is_file():
        return name
    lines = [line.split(":", 1) for line in facts.read_text().splitlines() if ":" in line]
    known = {key.strip(): value.strip() for key, value in lines}
    flags = known.get("flags", "").split()
    return " ".join([known.get("model name", name), *(each for each in _SETS if each in flags)])


def _gpu() -> dict[str, Any]:
    """The first one, from the driver's library: no context is made here."""
    unknown = dict.fromkeys(("gpu", "gpu_memory_bytes", "driver"))
    try:
        import pynvml
    except ImportError:  # macOS, for which there is none
        return unknown
    try:
        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByIndex(0)
        return {
            "gpu": str(pynvml.nvmlDeviceGetName(card)),
            "gpu_memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(card).total),
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
        }
    except pynvml.NVMLError:
        return unknown
