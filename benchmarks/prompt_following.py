"""How well the demo model draws what held-out prompts ask for.

    nice python benchmarks/prompt_following.py --sheet outputs/prompt_following.png
    python benchmarks/prompt_following.py --quick --model outputs/demo/model

300 prompts: 40 % one thing at a place, 36 % two things in a relation, 24 % two to four equal ones,
on canvases of 128x128, 192x128 and 128x192 px (3:1:1). No combination of shape, colour and place,
of shape, colour and count, or of two things and their relation that is asked for here was seen in
training. `lowvram.run` draws them in each variant, and a rule-based detector, checked on 1,000
drawn pictures first, reads every picture. 1,800 pictures, and 320 for negative and empty prompts,
take about 20 minutes on two cores. The whole benchmark of the demo model writes
`benchmarks/results/prompt_following.json`, any other one writes where `--output` says;
the last line on stdout is compact JSON.
"""

import argparse
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

import lowvram  # noqa: E402
from benchmarks.guidance import empty_prompt, negative_prompts  # noqa: E402
from benchmarks.machine import recorded, save  # noqa: E402
from benchmarks.reconstruction import psnr  # noqa: E402
from lowvram.demo.captions import caption  # noqa: E402
from lowvram.demo.detector import (  # noqa: E402
    Sighting,
    look,
    match,
    place_of,
    relation_of,
    right_shares,
    verdict,
)  # fmt: skip
from lowvram.demo.drawing import draw  # noqa: E402
from lowvram.demo.pictures import captioned  # noqa: E402
from lowvram.demo.reading import ATTRIBUTES, Asked  # noqa: E402
from lowvram.demo.scenes import CANVASES, KINDS, Scene, random_scene  # noqa: E402
from lowvram.repository import resolve  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "prompt_following.json"
VARIANTS: dict[str, dict[str, Any]] = {  # options of `lowvram.run`
    "20 steps": {},
    "8 steps": {"steps": 8},
    "8-bit encoder": {"encoder_weights": "8bit"},
    "4-bit encoder": {"encoder_weights": "4bit"},
    "streamed": {"encoder_weights": "stream", "transformer_weights": "stream"},
    "strips": {"decode": "strips"},
}
DEFAULT = "20 steps"
_LEAST_DETECTED = 0.99
_BATCH = 16  # pictures per call of the transformer; each has its own noise in any batch


@dataclass(frozen=True)
class Way:
    """How pictures are made: the model, and what is the same in all variants."""

    model: str
    guidance_scale: float
    steps: int = 20

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], **options: Any
    ) -> list[Image.Image]:
        """A picture for each prompt and seed, by the product."""
        chosen = {"steps": self.steps, "guidance_scale": self.guidance_scale, **options}
        with tempfile.TemporaryDirectory() as folder:
            # A noise of its own for each: one noise for all would err alike in all of them.
            made = lowvram.run(
                list(prompts), model=self.model, output=folder, seed=list(seeds),
                images_per_prompt=1, batch_size=_BATCH, cache=False, in_process=True, **chosen,
            )  # fmt: skip
            return [Image.open(image.path).convert("RGB") for image in made.images]


def held_out_prompts(
    count: int, seed: int, canvas: tuple[int, int] | None = None
) -> list[tuple[Scene, str]]:
    """Scenes that training never saw, and one of the ways to say each."""
    rng = random.Random(f"prompt following/{seed}")
    scenes = [random_scene(rng, held_out=True, canvas=canvas) for _ in range(count)]
    return [(scene, caption(scene, rng)) for scene in scenes]


def drawn(way: Way, asked: Sequence[tuple[Scene, str]], **options: Any) -> list[Image.Image]:
    """A picture of each prompt, its seed its place in the list."""
    pictures: dict[int, Image.Image] = {}
    for canvas in CANVASES:
        where = [index for index, (scene, _) in enumerate(asked) if scene.canvas == canvas]
        if where:
            prompts = [asked[index][1] for index in where]
            made = way.draw(prompts, where, size=canvas, **options)
            pictures |= dict(zip(where, made, strict=True))
    return [pictures[index] for index in range(len(asked))]


def shares(scenes: Sequence[Scene], sightings: Sequence[Sighting]) -> dict[str, Any]:
    """The share of pictures that are as asked: in everything, by kind, canvas and attribute."""
    rows = [verdict(seen, scene) for scene, seen in zip(scenes, sightings, strict=True)]
    pairs = list(zip(scenes, rows, strict=True))

    def share(name: str, chosen: Sequence[dict[str, bool]]) -> float | None:
        found = right_shares(chosen).get(name)
        return None if found is None else round(found, 4)

    return {
        "everything": share("everything", rows),
        "by_kind": {
            kind: share("everything", [row for scene, row in pairs if scene.kind == kind])
            for kind in KINDS
        },
        "by_canvas": {
            f"{width}x{height}": share(
                "everything", [row for scene, row in pairs if scene.canvas == (width, height)]
            )
            for width, height in CANVASES
        },
        "by_attribute": {name: share(name, rows) for name in ATTRIBUTES},
    }


def confusions(
    scenes: Sequence[Scene], sightings: Sequence[Sighting]
) -> dict[str, dict[str, dict[str, int]]]:
    """How often what was asked for (first name) was seen as what (second name)."""
    tables: dict[str, dict[str, Counter[str]]] = {name: {} for name in ATTRIBUTES}

    def add(name: str, asked: str, seen: str) -> None:
        tables[name].setdefault(asked, Counter())[seen or "none"] += 1

    for scene, sighting in zip(scenes, sightings, strict=True):
        wanted = Asked.of(scene)
        found = match(sighting, wanted)
        add("background", scene.background, sighting.background)
        add("count", str(len(wanted.objects)), str(len(sighting.objects)))
        for thing, seen in zip(wanted.objects, found, strict=True):
            for name in ("shape", "colour", "size"):
                add(name, str(getattr(thing, name)), getattr(seen, name) if seen else "missing")
        if wanted.place:
            at = found[0] and place_of(found[0], sighting.canvas)
            add("place", wanted.place, at or "missing")
        if wanted.relation:
            first, second = found
            stands = relation_of(first, second) if first and second else "missing"
            add("relation", wanted.relation, stands)
    return {
        name: {asked: dict(seen.most_common()) for asked, seen in sorted(table.items())}
        for name, table in tables.items()
    }


def check_detector(count: int = 1000) -> dict[str, Any]:
    """Its score on drawn pictures, half of them of held-out combinations."""
    rng = random.Random("detector")
    scenes = [random_scene(rng, held_out=bool(index % 2)) for index in range(count)]
    found = {"pictures": count, **shares(scenes, [look(draw(scene)) for scene in scenes])}
    if found["everything"] < _LEAST_DETECTED:
        raise SystemExit(f"the detector reads {found['everything']:.1%} of drawn pictures right")
    return found


def measure(
    way: Way, count: int, variants: Sequence[str], sheet: Path | None, jobs: int = 1
) -> dict[str, Any]:
    """Draw `count` held-out prompts in each variant and judge them, `jobs` variants at a time."""
    asked = held_out_prompts(count, seed=0)
    scenes = [scene for scene, _ in asked]
    document: dict[str, Any] = {"detector": check_detector(), "variants": {}}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        made = pool.map(partial(_variant, way, asked), variants)
        for name, (pictures, seconds) in zip(variants, made, strict=True):
            sightings = [look(picture) for picture in pictures]
            each = shares(scenes, sightings) | {"seconds_per_picture": seconds}
            document["variants"][name] = each
            print(f"{name:14} {each['everything']:.1%}", flush=True)
            if name == DEFAULT:
                document["confusions"] = confusions(scenes, sightings)
                document["wrong"] = _wrong(asked, sightings)
                if sheet is not None:
                    _write_sheet(sheet, asked, pictures, sightings)
    return document


def _variant(
    way: Way, asked: Sequence[tuple[Scene, str]], name: str
) -> tuple[list[Image.Image], float]:
    """The pictures of a variant, and seconds for each."""
    _quiet()
    began = time.perf_counter()
    pictures = drawn(way, asked, **VARIANTS[name])
    return pictures, round((time.perf_counter() - began) / len(asked), 3)


def _quiet() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each layer and text


def _wrong(
    asked: Sequence[tuple[Scene, str]], sightings: Sequence[Sighting]
) -> list[dict[str, Any]]:
    """The prompts whose picture is not as asked, and in what."""
    told = []
    for index, ((scene, prompt), seen) in enumerate(zip(asked, sightings, strict=True)):
        failed = [name for name, right in verdict(seen, scene).items() if not right]
        if failed:
            size = "{}x{}".format(*scene.canvas)
            told.append({"prompt": prompt, "seed": index, "size": size, "wrong": failed[:-1]})
    return told


def _write_sheet(
    path: Path,
    asked: Sequence[tuple[Scene, str]],
    pictures: Sequence[Image.Image],
    sightings: Sequence[Sighting],
) -> None:
    texts = []
    for (scene, prompt), seen in zip(asked, sightings, strict=True):
        failed = [name for name, right in verdict(seen, scene).items() if not right][:-1]
        texts.append(f"{prompt}\nWRONG: {', '.join(failed)}" if failed else prompt)
    path.parent.mkdir(parents=True, exist_ok=True)
    captioned(pictures, texts, columns=10).save(path)


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="another folder in diffusers layout")
    parser.add_argument("--quick", action="store_true", help="60 prompts, 20 steps, nothing else")
    parser.add_argument("--variants", help=f"some, with commas, of: {', '.join(VARIANTS)}")
    parser.add_argument("--jobs", type=int, default=1, help="variants at a time, a process each")
    parser.add_argument("--guidance-scale", type=float, help="instead of the demo's default")
    parser.add_argument("--sheet", type=Path, help="write the pictures of 20 steps to this PNG")
    parser.add_argument("--output", type=Path, help="result file, .json")
    options = parser.parse_args()
    if options.output and options.output.suffix != ".json":
        parser.error(f"--output {options.output}: name a .json file")
    variants = [DEFAULT] if options.quick else list(VARIANTS)
    if options.variants:
        variants = [name.strip() for name in options.variants.split(",")]
        if unknown := set(variants) - set(VARIANTS):
            parser.error(f"no variant {', '.join(sorted(unknown))}: use {', '.join(VARIANTS)}")
    _quiet()
    guidance = options.guidance_scale or resolve("demo").guidance_scale
    way = Way(options.model, float(guidance))
    count = 60 if options.quick else 300
    document: dict[str, Any] = {
        "benchmark": "prompt_following",
        "model": "demo" if options.model == "demo" else Path(options.model).name,
        **recorded(),
        "prompts": count,
        "guidance_scale": way.guidance_scale,
    }
    document |= measure(way, count, variants, options.sheet, options.jobs)
    if not options.quick:
        document["vae_psnr"] = psnr(options.model)
        document["negative"] = negative_prompts(way.draw)
        document["empty"] = empty_prompt(way.draw, options.model)
    whole = options.model == "demo" and len(variants) == len(VARIANTS) and not options.quick
    output = options.output or (RESULTS if whole and options.guidance_scale is None else None)
    if output is not None:
        save(output.stem, document, output.parent)
    shown = {
        name: value
        for name, value in document.items()
        if name not in ("machine", "versions", "wrong")
    }
    print(json.dumps(shown, separators=(",", ":")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
