"""The judge of prompt following, checked on drawn pictures only."""

import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lowvram.demo.detector import look
from lowvram.demo.scenes import COLOURS, SHAPES, SIZES, Scene, draw, random_scene

ATTRIBUTES = ("shape", "colour", "background", "place", "size")


def shares(pictures: list[Image.Image], scenes: list[Scene]) -> dict[str, float]:
    """The share of pictures read right, by attribute."""
    seen = [look(picture).said for picture in pictures]
    return {
        name: float(np.mean([s[i] == scene.said[i] for s, scene in zip(seen, scenes, strict=True)]))
        for i, name in enumerate(ATTRIBUTES)
    }


def scenes(count: int) -> list[Scene]:
    rng = random.Random(7)
    return [random_scene(rng, held_out=bool(i % 2)) for i in range(count)]


def noisy(picture: Image.Image, seed: int, spread: float) -> Image.Image:
    """With Gaussian noise of `spread` levels (of 255) on every channel."""
    noise = np.random.default_rng(seed).normal(0, spread, (128, 128, 3))
    return Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))


def test_reads_drawn_scenes() -> None:
    asked = scenes(400)
    right = shares([draw(scene) for scene in asked], asked)
    assert min(right["colour"], right["background"], right["place"]) >= 0.99, right
    assert min(right["shape"], right["size"]) >= 0.97, right


def test_reads_through_slight_blur_and_noise() -> None:
    asked = scenes(300)
    blurred = [draw(scene).filter(ImageFilter.GaussianBlur(1.2)) for scene in asked]
    right = shares([noisy(picture, i, 6.0) for i, picture in enumerate(blurred)], asked)
    assert min(right["colour"], right["background"], right["place"]) >= 0.98, right
    assert min(right["shape"], right["size"]) >= 0.93, right


def test_reads_through_a_tint() -> None:
    """Colours a little off the palette, as a decoder may make them, keep their names."""
    asked = scenes(200)
    tinted = [draw(scene).point(lambda level: min(level * 0.93 + 8, 255)) for scene in asked]
    assert shares(tinted, asked)["colour"] >= 0.99


def test_a_flat_picture_has_a_background_and_nothing_else() -> None:
    for name, rgb in COLOURS.items():
        seen = look(noisy(Image.new("RGB", (128, 128), rgb), 0, 4.0))
        assert seen.said == ("", "", name, "", "")


def test_a_wrong_picture_is_judged_wrong() -> None:
    """The judge reports what is there, whatever was asked."""
    drawn = Scene("heart", "red", "yellow", "bottom left", "large")
    assert look(draw(drawn)).said == drawn.said
    assert look(draw(drawn).transpose(Image.Transpose.ROTATE_180)).place == "top right"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_overlap_is_high_for_the_true_shape(shape: str, size: str) -> None:
    seen = look(draw(Scene(shape, "black", "white", "top", size)))
    assert seen.shape == shape and seen.overlap > 0.9


def test_other_picture_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="256"):
        look(Image.new("RGB", (256, 256)))
