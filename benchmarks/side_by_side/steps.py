"""Steps and encodings one after the other in one process, which pays for its imports once.

    python -m benchmarks.side_by_side.steps < tasks.jsonl > rows.jsonl

Through the public functions, `lowvram.denoise` and `lowvram.encode`; slower disks, buses and blocks
are put around them from outside (`throttle.py`). Each task is a line, and so is each row.
"""

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.baselines.outcome import error_of
from benchmarks.side_by_side.inputs import embeddings
from benchmarks.side_by_side.throttle import bus, cycles_per_second, disk

PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_process_bytes", "peak_rss_bytes")


def main() -> int:
    """Carry out the tasks of stdin."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from lowvram.terminal import quiet_libraries

    quiet_libraries()
    for line in sys.stdin:
        answer.write(json.dumps(carry_out(json.loads(line)), separators=(",", ":")) + "\n")
        answer.flush()
    return 0


def carry_out(task: dict[str, Any]) -> dict[str, Any]:
    """One task's row; what goes wrong is a row too.

    Args:
        task: "key"; "stage" (denoise or encode), "weights", "model", "size", "steps", "device",
            "folder"; "bus" and "disk" in bytes a second, "block" in seconds, or null.
    """
    row: dict[str, Any] = {"key": task["key"], "ok": False, "error": None}
    try:
        with disk(task["disk"]), bus(task["bus"]), slow_blocks(task["block"], task["device"]):
            made = denoise(task) if task["stage"] == "denoise" else encode(task)
        return row | {"ok": True, **made}
    except Exception as error:  # a row of the table
        return row | {"error": error_of(error, task["stage"])}


def denoise(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step: the median, without the first, which also fills buffers."""
    import torch

    import lowvram

    ended: list[float] = []

    def note(step: int, timestep: int, latents: torch.Tensor) -> None:
        if task["device"] == "cuda":
            torch.cuda.synchronize()
        ended.append(time.perf_counter())

    output = Path(task["folder"]) / "step.latents.safetensors"
    started = time.perf_counter()
    result = lowvram.denoise(
        embeddings(Path(task["folder"]), Path(task["model"])),
        output=output,
        weights=task["weights"],
        steps=task["steps"],
        size=(task["size"], task["size"]),
        binning=False,
        device=task["device"],
        callback=note,
    )
    steps = [after - before for before, after in itertools.pairwise(ended)]
    report = result.report.to_json()
    return {
        "seconds_per_step": statistics.median(steps),
        "step_seconds": [round(each, 5) for each in steps],
        "first_step_seconds": ended[0] - started,
        "outcome": _digest(output),
        "says": report["reasons"],
        "predicted": report["predicted"],
        **{name: report[name] for name in PEAKS},
    }


def encode(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of encoding one prompt and the empty text, from the files on."""
    import lowvram
    from benchmarks.baselines.request import first_prompts

    output = Path(task["folder"]) / "step.embeds.safetensors"
    size = sum(p.stat().st_size for p in Path(task["model"], "text_encoder").glob("*.safetensors"))
    result = lowvram.encode(
        first_prompts(1),
        task["model"],
        output=output,
        weights=task["weights"],
        device=task["device"],
        cache=False,
        clean_caption=False,
    )
    report = result.report.to_json()
    reading = None if task["disk"] is None else size / task["disk"]
    return {
        "seconds": report["load_seconds"] + report["compute_seconds"],
        "seconds_of_reading_alone": reading,
        "outcome": _digest(output),
        "says": report["reasons"],
        "predicted": report["predicted"],
        **{name: report[name] for name in PEAKS},
    }


@contextmanager
def slow_blocks(seconds: float | None, device: str) -> Iterator[None]:
    """Every block of the transformer computes for so long besides; None: as fast as it is.

    On a GPU the wait is a kernel, so that copies run beside it as beside real work.
    """
    if seconds is None:
        yield
        return
    from diffusers.models.attention import BasicTransformerBlock

    forward, wait = BasicTransformerBlock.forward, _waiter(seconds, device)

    def slow(self: Any, *arguments: Any, **options: Any) -> Any:
        made = forward(self, *arguments, **options)
        wait()
        return made

    BasicTransformerBlock.forward = slow
    try:
        yield
    finally:
        BasicTransformerBlock.forward = forward


def _waiter(seconds: float, device: str) -> Any:
    """A function that lets the device wait for so long."""
    if device != "cuda":
        return lambda: time.sleep(seconds)
    import torch

    cycles = int(cycles_per_second() * seconds)
    return lambda: torch.cuda._sleep(cycles)


def _digest(path: Path) -> str:
    """Of the tensors in an artifact: equal numbers, equal text."""
    from lowvram import artifacts

    kind = "latents" if path.name.endswith(".latents.safetensors") else "embeds"
    tensors = artifacts.read_header(path, kind).tensors
    return "-".join(tensors[name]["sha256"][:12] for name in sorted(tensors))


if __name__ == "__main__":
    sys.exit(main())
