"""The caches that lowvram works with in a row: rates measured beforehand, and prepared weights.

Rows with prepared weights have a cache of their own, so that no other row finds them.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.side_by_side.processes import json_of, python
from benchmarks.side_by_side.rows import Plan

STAGES = ("encode", "denoise", "decode")
_WEIGHTED = ("text_encoder", "transformer", "vae")
_PREPARED_STAGES = ("encode", "denoise")  # nothing is prepared for the VAE
_RATES = "rates.json"  # as lowvram/memory/rates.py writes it


def cache_of(folder: Path, plan: Plan) -> Path:
    """The `LOWVRAM_CACHE` of a row."""
    return folder / f"cache-{'prepared' if plan.part == 'prepared' else 'plain'}"


def environment(cache: Path) -> dict[str, str]:
    """Of a row's process: nothing is fetched."""
    return {
        "HF_HUB_OFFLINE": "1",
        "LOWVRAM_CACHE": str(cache),
        "TOKENIZERS_PARALLELISM": "false",
    }


def runs_lowvram(plan: Plan) -> bool:
    """Whether the planner has a say in it."""
    return plan.contender.split()[0] in ("lowvram", *STAGES)


def measure_rates(cache: Path, others: Sequence[Path], card: Sequence[str], left: float) -> bool:
    """Let `lowvram doctor` measure a card, unless that was done; whether the cache has its rates.

    Without them the planner assumes a CUDA context of 0.5 GB; an H100's took 0.72 to 0.79.

    Args:
        others: caches whose rates serve as well.
        card: what names it in the cache: card, torch and driver.
        left: seconds that it may take.
    """
    if _has_rates(cache, card):
        return True
    cache.mkdir(parents=True, exist_ok=True)
    for other in others:
        if _has_rates(other, card):
            shutil.copy(other / _RATES, cache / _RATES)
            return True
    # It fails where 8 bits do not work, and has kept the rates all the same.
    json_of(python("lowvram", "doctor", "--json"), left, environment(cache))
    return _has_rates(cache, card)


def _has_rates(cache: Path, card: Sequence[str]) -> bool:
    try:
        entries = json.loads((cache / _RATES).read_text(encoding="utf-8"))["rates"]
    except (OSError, ValueError, KeyError):
        return False
    return any(all(word in name for word in card) for name in entries)


def weights_read(plan: Plan, model: Path, cache: Path) -> list[Path]:
    """The folders whose weights a row reads."""
    if "prepared" in plan.also:
        return [cache / "prepared", model / "vae"]
    return [model / part for part in _WEIGHTED]


def not_prepared(row: Mapping[str, Any]) -> str:
    """The stages of a row that did not read prepared weights, by their own reasons; "" for none."""
    used = {
        stage["name"]
        for stage in row["stages"]
        if any(reason.startswith("prepared (") for reason in stage.get("reasons") or ())
    }
    return ", ".join(name for name in _PREPARED_STAGES if name not in used)
