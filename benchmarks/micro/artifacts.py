"""How fast the files between the stages are written, verified and read, at their true sizes.

    nice python benchmarks/micro/artifacts.py

An embeds file of 100 prompts of 27 tokens and one of 8 padded to 300 (T5-XXL's width, bf16), a
latents file of one picture of 1024 px and one of 100 (fp32). Writing ends with the folder's fsync;
beside it stands writing the same bytes in one piece, synced likewise. Medians in bytes a second.
The last line is one compact JSON, which also goes to `benchmarks/results/micro_artifacts.json`.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

from benchmarks.machine import recorded, save  # noqa: E402
from lowvram import artifacts  # noqa: E402

_WIDTH = 4096  # of T5-XXL's embeddings
FILES = {  # kind, then shape and dtype of its tensor
    "embeds, 100 prompts of 27 tokens": ("embeds", (100, 27, _WIDTH), torch.bfloat16),
    "embeds, 8 prompts padded to 300": ("embeds", (8, 300, _WIDTH), torch.bfloat16),
    "latents, 1 picture of 1024 px": ("latents", (1, 4, 128, 128), torch.float32),
    "latents, 100 pictures of 1024 px": ("latents", (100, 4, 128, 128), torch.float32),
}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Artifacts: write, verify, read.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=ROOT / ".checkpoints", help="%(default)s")
    options = parser.parse_args()
    document = {"benchmark": "micro_artifacts", **recorded(), "repeats": options.repeats}
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        document["rows"] = {
            name: timed(Path(place), kind, torch.randn(shape).to(dtype), options.repeats)
            for name, (kind, shape, dtype) in FILES.items()
        }
    save("micro_artifacts", document)
    print(json.dumps(document, separators=(",", ":")))
    return 0


def timed(folder: Path, kind: str, tensor: Tensor, repeats: int) -> dict[str, object]:
    """Bytes of the file, and bytes a second of each thing that is done with it."""
    path, plain = folder / f"x{artifacts.SUFFIXES[kind]}", folder / "plain"
    tensors = {f"tensor {index}": each for index, each in enumerate(tensor)}
    header = artifacts.Header(kind, {"name": "made up"}, {}, [{} for _ in tensors])
    artifacts.write(path, header, tensors)
    data = path.read_bytes()
    ways: dict[str, Callable[[], object]] = {
        "write": lambda: artifacts.write(path, header, tensors),
        "plain_write": lambda: plainly(plain, data),
        "verify": lambda: artifacts.verify(path, kind),
        "read": lambda: artifacts.read(path, kind),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    rates = {f"{name}_bytes_per_second": len(data) / each for name, each in medians.items()}
    return {"bytes": len(data), "median_seconds": medians, **rates}


def plainly(path: Path, data: bytes) -> None:
    """The same bytes, in the file and on the disk, and nothing else."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    artifacts.fsync_folder(path.parent)


if __name__ == "__main__":
    sys.exit(main())
