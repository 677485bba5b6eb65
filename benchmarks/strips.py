"""VAE decode at its true size: strips against whole, by turns in one process.

    nice python benchmarks/strips.py

512 px in float32 on the CPU with random weights; the ratio of the medians and the largest
difference of a pixel. Then the bytes that strips hold on a device, counted on fake tensors in
float16. The last line is one compact JSON, which also goes to `benchmarks/results/strips.json`.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

from benchmarks.machine import recorded, save  # noqa: E402
from lowvram.families.pixart import FAMILY  # noqa: E402
from lowvram.memory.count import LiveBytes, fake_device  # noqa: E402
from lowvram.pixels.feature_maps import InRam  # noqa: E402
from lowvram.pixels.strips import StripDecode, comfortable_room  # noqa: E402
from lowvram.pixels.whole import WholeDecode  # noqa: E402
from lowvram.weights.checkpoint import build  # noqa: E402

CPU = torch.device("cpu")


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Strips against whole.")
    parser.add_argument("--side", type=int, default=512, help="of the picture, px")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--count", type=int, nargs="*", default=[256, 512, 1024])
    options = parser.parse_args()
    document = {"benchmark": "strips", **recorded()}
    document |= timed(options.side, options.repeats)
    document["device_bytes"] = {side: counted(side) for side in options.count}
    save("strips", document)
    print(json.dumps(document, separators=(",", ":")))
    return 0


def timed(side: int, repeats: int) -> dict[str, object]:
    """Seconds of each, by turns."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(FAMILY.published_configs["vae"]).eval().requires_grad_(False)
    latents = torch.randn(1, 4, side // 8, side // 8) * 0.9 / 0.13025  # unscaled, std 7
    room = comfortable_room(vae, side, side, torch.float32, "cpu")
    ways = {"whole": WholeDecode(), "strips": StripDecode(room, InRam())}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    pixels = {}
    with torch.inference_mode():
        for _ in range(repeats):
            for name, way in ways.items():
                started = time.perf_counter()
                pixels[name] = way.decode(vae, latents, CPU, lambda done, total: None)
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "side": side,
        "seconds": seconds,
        "strips_to_whole": medians["strips"] / medians["whole"],
        "largest_difference": float((pixels["strips"] - pixels["whole"]).abs().max()),
        "largest_pixel": float(pixels["whole"].abs().max()),
        "room_bytes": room,
    }


def counted(side: int) -> dict[str, int]:
    """Bytes besides the weights, foretold and counted, for a device beside the host."""
    with torch.inference_mode(False), fake_device() as device:
        with device:
            vae = build(AutoencoderKL, FAMILY.published_configs["vae"], torch.float16)
        room = comfortable_room(vae, side, side, torch.float16, device.type)
        with torch.inference_mode(), LiveBytes(device.type) as live:
            latents = torch.empty(1, 4, side // 8, side // 8, dtype=torch.float16)
            StripDecode(room, InRam()).decode(vae, latents, device, lambda done, total: None)
    halves = (vae.decoder, vae.post_quant_conv)
    weights = sum(2 * p.numel() for half in halves for p in half.parameters())
    return {"room": room, "counted": live.peak, "weights": weights}


if __name__ == "__main__":
    sys.exit(main())
