"""T5-XXL at its true size, streamed from disk, against reading the same bytes and computing.

    nice python benchmarks/streaming.py .checkpoints/pixart-sigma-512-published-bfloat16

Three rows in one run, each from a cold page cache: reading the text encoder's files and nothing
else; computing with resident (mapped, warm) weights; streaming. The last line is one compact JSON,
which also goes to `benchmarks/results/streaming.json`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

from benchmarks.machine import recorded, save  # noqa: E402
from benchmarks.watched import evict  # noqa: E402
from lowvram.families.pixart import FAMILY  # noqa: E402
from lowvram.memory.meter import Meter  # noqa: E402
from lowvram.memory.process import peak_rss_bytes  # noqa: E402
from lowvram.weights.checkpoint import Weights, find_class  # noqa: E402
from lowvram.weights.streamed import Streamed  # noqa: E402
from lowvram.weights.whole import Whole  # noqa: E402

_READ_BYTES = 1 << 24
TOKENS = (21, 1)
CPU = torch.device("cpu")


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Streaming against reading and computing.")
    parser.add_argument("folder", type=Path, help="a checkpoint by scripts/make_checkpoint.py")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of each text")
    options = parser.parse_args()
    folder = options.folder / "text_encoder"
    about, size = recorded(), evict(folder)
    rows = {"read": {"seconds": read(folder)}}
    component = FAMILY.component("text_encoder")
    stream = Streamed(torch.bfloat16, component.blocks, parks=True)
    small = Streamed(torch.bfloat16, component.blocks, unit="matrix", group=2, parks=True)
    for name, weights in (
        ("compute", Whole(torch.bfloat16)),  # its files are in the page cache now
        ("stream by blocks", stream),
        ("stream by matrices", small),
    ):
        if name != "compute":
            evict(folder)
        rows[name] = encode(weights, folder, options.tokens)
    bound = max(rows["read"]["seconds"], rows["compute"]["seconds"])
    ratios = {n: rows[n]["seconds"] / bound for n in rows if n.startswith("stream")}
    document = {"benchmark": "streaming", **about, "bytes": size, "tokens": list(options.tokens)}
    document |= {"rows": rows, "stream_to_larger": ratios}
    save("streaming", document)
    print(json.dumps(document, separators=(",", ":")))
    return 0


def read(folder: Path) -> float:
    """Seconds to read the files, from one end to the other."""
    started, buffer = time.perf_counter(), bytearray(_READ_BYTES)
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def encode(weights: Weights, folder: Path, tokens: list[int]) -> dict[str, float]:
    """Seconds from files to embeddings of texts of so many tokens, and the memory it takes."""
    meter = Meter(CPU)
    before = peak_rss_bytes()
    with torch.inference_mode():
        started = time.perf_counter()
        loaded = weights.load(find_class("transformers.T5EncoderModel"), folder, CPU)
        texts = [torch.full((1, count), 5) for count in tokens]
        loaded.each(
            [lambda ids=ids: loaded.model(ids)[0] for ids in texts], lambda done, total: None
        )
        seconds = time.perf_counter() - started
        held = loaded.weights_bytes
        loaded.close()
    peak = meter.peaks()["peak_rss_bytes"] or 0
    return {"seconds": seconds, "weights_bytes": held, "peak_rss_above_bytes": peak - before}


if __name__ == "__main__":
    sys.exit(main())
