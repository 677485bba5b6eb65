"""What other ways of working cost the demo model, in embeddings, latents, pictures and following.

    OMP_NUM_THREADS=1 nice python benchmarks/compare_demo.py --sheet outputs/compare_demo.png

Twelve prompts whose scenes training never saw, each with a seed of its own, through every way of
each stage and every dtype. Writes `benchmarks/results/compare_demo.json`; the last line on stdout
is one compact JSON. One thread, because other work on the machine makes two wait for each other.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

import lowvram  # noqa: E402
from benchmarks.machine import recorded, save  # noqa: E402
from benchmarks.prompt_following import held_out_prompts  # noqa: E402

VARY: Any = {
    "encoder_weights": ["whole", "8bit", "4bit", "stream"],
    "transformer_weights": ["whole", "stream"],
    "decode": ["whole", "strips", "blended"],
    "dtype": ["auto", "fp32", "bf16"],
}
_STAGE = ("stage", "device", "weights", "dtype", "load_seconds", "compute_seconds")
_STAGE_BYTES = ("weights_bytes", "peak_allocated_bytes", "peak_rss_bytes", "disk_read_bytes")


def main() -> int:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description="Compare ways of working on the demo model.")
    parser.add_argument("--count", type=int, default=12, help="prompts")
    parser.add_argument("--sheet", type=Path, help="also put the sheet there")
    options = parser.parse_args()
    prompts = [prompt for _, prompt in held_out_prompts(options.count, 0, (128, 128))]
    about = recorded()
    with tempfile.TemporaryDirectory() as folder:
        seeds = list(range(options.count))
        found = lowvram.compare(prompts, "demo", folder, vary=VARY, seed=seeds, images_per_prompt=1)
        if options.sheet is not None:
            options.sheet.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.sheet, options.sheet)
    document = {
        "benchmark": "compare_demo",
        **about,
        "threads": os.environ.get("OMP_NUM_THREADS", "all cores"),
        "pictures": found.to_json()["pictures"],
        "settings": found.to_json()["settings"],
        "variants": [_short(each) for each in found.to_json()["variants"]],
    }
    save("compare_demo", document)
    print(json.dumps([_line(each) for each in document["variants"]], separators=(",", ":")))
    return 0


def _short(variant: dict[str, Any]) -> dict[str, Any]:
    """Without paths, and without what is there for each token."""
    embeds = variant["embeds"]
    kept = {name: value for name, value in variant.items() if name not in ("files", "embeds")}
    kept["embeds"] = embeds and {name: embeds[name] for name in embeds if name != "texts"}
    kept["stages"] = [
        {"of": each["of"], **{name: each["report"][name] for name in (*_STAGE, *_STAGE_BYTES)}}
        for each in variant["stages"]
    ]
    return kept


def _line(variant: dict[str, Any]) -> dict[str, Any]:
    pictures, following = variant["pictures"], variant["following"]
    return {
        "name": variant["name"],
        "embeds": (variant["embeds"] or {}).get("error"),
        "latents": (variant["latents"] or {}).get("error"),
        "psnr": (pictures or {}).get("psnr"),
        "found": following and following["found"],
    }


if __name__ == "__main__":
    sys.exit(main())
