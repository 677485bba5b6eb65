"""How fast the product reads weights, beside `dd` and the same file.

    nice python benchmarks/micro/reader.py

By turns, each from the disk (cold: the page cache gives the file up before) and from memory (warm):
`dd` with blocks of 1 MiB into nothing; `Shards.read_into`, which fills a buffer as streaming to a
device does; `Shards.warm`, which streaming on a CPU does; and a pump with two slots that converts
bf16 to fp32, as streaming in fp32 does. Medians in bytes a second. The last line is one compact
JSON, which also goes to `benchmarks/results/micro_reader.json`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

from benchmarks.machine import recorded, save  # noqa: E402
from benchmarks.watched import evict  # noqa: E402
from lowvram.weights.lanes import ConvertingLane, Unit  # noqa: E402
from lowvram.weights.pump import Pump  # noqa: E402
from lowvram.weights.shards import Shards  # noqa: E402
from lowvram.weights.tensor_files import Spec, write_file  # noqa: E402

_SHAPE = (4096, 4096)  # a matrix of T5-XXL's attention: 33.6 MB in bf16
_MATRIX_BYTES = 2 * 4096 * 4096


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="The product's reader against dd.")
    parser.add_argument("--matrices", type=int, default=8, help="of 33.6 MB (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=ROOT / ".checkpoints", help="%(default)s")
    options = parser.parse_args()
    document = {"benchmark": "micro_reader", **recorded()}
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        path = Path(place) / "model.safetensors"
        size = write(path, options.matrices)
        rows = timed(ways(path), Path(place), size, options.repeats)
    document |= {"bytes": size, "repeats": options.repeats, "rows": rows}
    save("micro_reader", document)
    print(json.dumps(document, separators=(",", ":")))
    return 0


def write(path: Path, matrices: int) -> int:
    """A file of random matrices in bf16, on the disk when this returns; its bytes."""
    names = [f"matrix {number}" for number in range(matrices)]
    torch.manual_seed(0)  # some file systems compress
    matrix = torch.randn(_SHAPE).to(torch.bfloat16)
    specs = [Spec(name, torch.bfloat16, _SHAPE) for name in names]
    write_file(path, specs, (matrix for _ in names))
    os.sync()
    return path.stat().st_size


def ways(path: Path) -> dict[str, Callable[[], None]]:
    """Each reads the whole file once."""
    shards = Shards(path.parent)
    out = torch.empty(_SHAPE, dtype=torch.bfloat16)

    def dd() -> None:
        command = ["dd", f"if={path}", f"of={os.devnull}", "bs=1048576"]
        subprocess.run(command, check=True, capture_output=True)

    def fill() -> None:
        for name in shards.tensors:
            shards.read_into(name, out)

    def warm() -> None:
        for name in shards.tensors:
            shards.warm(name)

    return {"dd": dd, "read_into": fill, "warm": warm, "pump, bf16 to fp32": lambda: pump(shards)}


def pump(shards: Shards) -> None:
    """Every matrix through a reader thread and two buffers."""
    units = [Unit.of({name: torch.float32}, shards) for name in shards.tensors]
    lane = ConvertingLane(shards, units, 2)
    reader = Pump(lane, units, range(len(units)))
    for index in range(len(units)):
        reader.take(index)
        reader.give_back(index)
    reader.close()
    lane.close()


def timed(
    readers: dict[str, Callable[[], None]], folder: Path, size: int, repeats: int
) -> dict[str, dict[str, object]]:
    """Bytes a second of each, cold and warm, by turns, and the ratio to dd's."""
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeats):
        for temperature in ("cold", "warm"):
            for name, read in readers.items():
                if temperature == "cold":
                    evict(folder)
                started = time.perf_counter()
                read()
                rate = size / (time.perf_counter() - started)
                found.setdefault((name, temperature), []).append(rate)
    medians = {key: statistics.median(rates) for key, rates in found.items()}
    return {
        f"{name}, {temperature}": {
            "bytes_per_second": median,
            "to_dd": median / medians["dd", temperature],
            "all": found[name, temperature],
        }
        for (name, temperature), median in medians.items()
    }


if __name__ == "__main__":
    sys.exit(main())
