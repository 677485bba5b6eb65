"""Twelve prompts and what the demo model draws of them, for the README: `scripts/demo_sheet.py`.

Writes docs/demo.png, made by the weights in the package with default settings, each picture with
its place in the list as its seed. No picture is chosen among several.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

import lowvram  # noqa: E402
from lowvram.demo.pictures import captioned  # noqa: E402
from lowvram.repository import resolve  # noqa: E402

SQUARE, WIDE, TALL = (128, 128), (192, 128), (128, 192)
PROMPTS = (  # a row of the sheet has pictures of one height
    ("a large blue star on a yellow background", SQUARE),
    ("a small white ring in the top left corner, black background", SQUARE),
    ("three red hearts on pink", WIDE),
    ("a green cross to the left of an orange circle, on white", WIDE),
    ("four purple diamonds on a yellow background", SQUARE),
    ("background of blue, a tiny white star at the bottom right", SQUARE),
    ("a pair of large pink squares on a black background", WIDE),
    ("a big yellow triangle on the right of a small red ring, on grey", WIDE),
    ("a black heart above a white square on a red background", TALL),
    ("a grey diamond", TALL),
    ("three small orange stars on a purple backdrop", TALL),
    ("a large red circle below a small green triangle, on white", TALL),
)
COLUMNS = 4


def main() -> int:
    """Draw, lay out, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="another folder in diffusers layout")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "demo.png")
    options = parser.parse_args()
    pictures: dict[int, Image.Image] = {}
    for size in (SQUARE, WIDE, TALL):
        chosen = [index for index, (_, canvas) in enumerate(PROMPTS) if canvas == size]
        with tempfile.TemporaryDirectory() as folder:
            made = lowvram.run(
                [PROMPTS[index][0] for index in chosen], model=options.model, output=folder,
                seed=chosen, images_per_prompt=1, size=size, in_process=True,
                guidance_scale=resolve("demo").guidance_scale,
            )  # fmt: skip
            for index, image in zip(chosen, made.images, strict=True):
                pictures[index] = Image.open(image.path).convert("RGB")
    shown = [pictures[index] for index in range(len(PROMPTS))]
    sheet = captioned(shown, [prompt for prompt, _ in PROMPTS], COLUMNS, scale=2)
    sheet.save(options.output, optimize=True)
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
