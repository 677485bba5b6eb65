"""`lowvram run` as a user types it, read from the JSON that it prints.

`--budget` is its `--vram`; where none is said, `--limit` is. Embeddings come from no cache: the
same text would cost nothing the second time. Prompts are encoded as they stand, as by all others.
"""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.baselines.measure import together
from benchmarks.baselines.outcome import Failed, Outcome
from benchmarks.baselines.request import Request
from benchmarks.watched import run_once

_TIMEOUT_SECONDS = 7200
_OUT_OF_MEMORY = 6  # the exit code of errors.MemoryExhaustedError
_FROM_REPORT = {
    "seconds": "seconds",
    "peak_allocated_bytes": "peak_allocated_bytes",
    "peak_reserved_bytes": "peak_reserved_bytes",
    "peak_process_bytes": "peak_process_bytes",
    "peak_rss_bytes": "peak_rss_bytes",
    "read_bytes": "disk_read_bytes",
}
_ALSO = ("weights", "dtype", "reasons", "predicted", "load_seconds", "compute_seconds")


def run(request: Request) -> Outcome:
    """Carry out the command and say what came of it.

    Raises:
        Failed: with the line that the command printed.
    """
    started = time.time()
    command = [sys.executable, "-m", "lowvram", *arguments(request), "--json"]
    ended = run_once(command, _TIMEOUT_SECONDS)
    if ended["error"]:
        raise Failed(failure(ended["error"]))
    document = json.loads(ended["output"])
    pictures = [Path(image["path"]) for image in document["images"]]
    kept = None if request.latents else _latents(request, document["images"])
    rows = [_row(stage) for stage in document["stages"]]
    whole = together(rows) | {"name": "all", "seconds": ended["wall_seconds"]}
    whole |= {"peak_anonymous_bytes": (ended["peaks_seen"] or {}).get("anonymous")}
    return Outcome([*rows, whole], started, pictures, kept)


def arguments(request: Request) -> list[str]:
    """What follows `lowvram` on the command line."""
    bounds = {"--vram": request.budget or request.limit, "--stage-budget": request.stage_budget}
    shared = ["--device", request.device]
    for name, amount in bounds.items():
        shared += [] if amount is None else [name, f"{amount / 1024:.3f}KiB"]
    # Half precision is what it takes by itself on a GPU, with T5 in bfloat16.
    shared += [] if request.dtype == "fp16" else ["--dtype", request.dtype]
    if request.latents is not None:
        return ["decode", str(_artifact(request)), "-o", str(request.picture(0)), *shared]
    wanted = ["--size", f"{request.size}x{request.size}", "--steps", str(request.steps)]
    wanted += ["--seed", str(request.seed), "--no-binning", "--no-clean", "--no-cache"]
    common = ["-m", str(request.model), *wanted, *shared]
    if len(request.prompts) == 1:
        return ["run", request.prompts[0], "-o", str(request.picture(0)), *common]
    listed = request.output / "prompts.txt"
    listed.write_text("\n".join(request.prompts) + "\n", encoding="utf-8")
    return ["run", "--prompts", str(listed), "-o", str(request.output), *common]


def failure(error: str) -> str:
    """The command's last line as an outcome: "out of memory at STAGE", or "cannot: …"."""
    said = error.partition(": ")[2]
    if error.startswith(f"exit code {_OUT_OF_MEMORY}:"):
        stage = re.search(r"\b(encode|denoise|decode)\b", said)
        return f"out of memory at {stage[1] if stage else 'all'}"
    return f"cannot: {said.removeprefix('lowvram: ')}"


def _row(stage: dict[str, Any]) -> dict[str, Any]:
    row = {ours: stage.get(theirs) for ours, theirs in _FROM_REPORT.items()}
    return {"name": stage["stage"], **row, **{name: stage.get(name) for name in _ALSO}}


def _latents(request: Request, images: list[dict[str, Any]]) -> Path:
    """The latents of all pictures as one file, as the other contenders leave them."""
    import torch
    from safetensors.torch import load_file, save_file

    files = dict.fromkeys(image["latents"] for image in images)
    found = [load_file(file)["latents"] for file in files]
    path = request.output / "latents.safetensors"
    save_file({"latents": torch.cat(found)}, path)
    return path


def _artifact(request: Request) -> Path:
    """Finished latents as `lowvram denoise` would have written them."""
    from benchmarks.side_by_side.inputs import finished

    assert request.latents is not None
    path = request.output / "finished.latents.safetensors"
    return finished(request.latents, request.model, path)
