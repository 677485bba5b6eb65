"""How well the demo model draws what held-out prompts ask for.

    python benchmarks/prompt_following.py --sheet outputs/prompt_following.png

No tuple of shape, colour, background, place and size that is asked for here was seen in training.
A rule-based detector, checked on drawn pictures only, reads every picture. Writes
`benchmarks/results/prompt_following.json`; the last line on stdout is the same as compact JSON.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

import lowvram  # noqa: E402
from benchmarks.machine import RESULTS, recorded, save  # noqa: E402
from lowvram.demo.detector import look  # noqa: E402
from lowvram.demo.pictures import sheet  # noqa: E402
from lowvram.demo.scenes import Scene, caption, random_scene  # noqa: E402

ATTRIBUTES = ("shape", "colour", "background", "place", "size")


def held_out_prompts(count: int, seed: int) -> list[tuple[Scene, str]]:
    """Scenes that training never saw, and one of the ways to say each."""
    rng = random.Random(f"prompt following/{seed}")
    scenes = [random_scene(rng, held_out=True) for _ in range(count)]
    return [(scene, caption(scene, rng)) for scene in scenes]


def shares_right(scenes: list[Scene], pictures: list[Image.Image]) -> dict[str, float]:
    """The share of pictures that are as asked: by attribute, both colours, and everything."""
    pairs = [
        [seen == asked for seen, asked in zip(look(picture).said, scene.said, strict=True)]
        for scene, picture in zip(scenes, pictures, strict=True)
    ]
    count = len(pairs)
    shares = {name: sum(row[i] for row in pairs) / count for i, name in enumerate(ATTRIBUTES)}
    shares["both_colours"] = sum(row[1] and row[2] for row in pairs) / count
    shares["everything"] = sum(all(row) for row in pairs) / count
    return {name: round(share, 4) for name, share in shares.items()}


def measure(
    count: int, seed: int, steps: int | None, guidance_scale: float | None, sheet_path: Path | None
) -> dict[str, object]:
    """Draw `count` held-out prompts and judge them; None for the product's default."""
    about, asked = recorded(), held_out_prompts(count, seed)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        result = lowvram.run(
            [prompt for _, prompt in asked],
            model="demo",
            output=folder,
            # A noise of its own for each: one noise for all would err alike in all of them.
            seed=range(seed, seed + count),
            images_per_prompt=1,
            steps=steps,
            guidance_scale=guidance_scale,
            cache=False,
            in_process=True,
        )
        seconds = time.perf_counter() - began
        pictures = [Image.open(image.path).convert("RGB") for image in result.images]
    if sheet_path is not None:
        sheet_path.parent.mkdir(parents=True, exist_ok=True)
        sheet(pictures, columns=10).save(sheet_path)
    return {
        "benchmark": "prompt_following",
        **about,
        "model": "demo",
        "prompts": count,
        "seed": seed,
        "steps": steps or "default",
        "guidance_scale": guidance_scale or "default",
        "right": shares_right([scene for scene, _ in asked], pictures),
        "seconds_per_picture": round(seconds / count, 3),
    }


def main() -> None:
    """Measure, write the result file, print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="prompts to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and of the noise")
    parser.add_argument("--steps", type=int, help="instead of the model's default")
    parser.add_argument("--guidance-scale", type=float, help="instead of the model's default")
    parser.add_argument("--sheet", type=Path, help="write all pictures to this PNG")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    figures = measure(
        options.count, options.seed, options.steps, options.guidance_scale, options.sheet
    )
    save("prompt_following", figures, options.output)
    print(json.dumps(figures, separators=(",", ":")))


if __name__ == "__main__":
    main()
