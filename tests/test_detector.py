"""The judge of prompt following, checked on drawn pictures only."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lowvram.demo.detector import look, place_of, verdict
from lowvram.demo.drawing import draw
from lowvram.demo.reading import asked
from lowvram.demo.scenes import (
    CANVASES,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    random_scene,
)

RED_CIRCLE, GREEN_SQUARE = Thing("circle", "red", "large"), Thing("square", "green", "small")


def scenes(count: int, seed: int = 7) -> list[Scene]:
    """Of all kinds, on all canvases, half of them held out."""
    rng = random.Random(seed)
    return [random_scene(rng, held_out=bool(index % 2)) for index in range(count)]


def right(drawn: Sequence[Scene], change: Callable[[Image.Image, int], Image.Image]) -> float:
    """The share of pictures read right in everything."""
    return float(
        np.mean(
            [
                verdict(look(change(draw(scene), index)), scene)["everything"]
                for index, scene in enumerate(drawn)
            ]
        )
    )


def wrong(drawn: Scene, scene: Scene) -> set[str]:
    """What is not as `scene` asks where something else was drawn."""
    return {name for name, said in verdict(look(draw(drawn)), scene).items() if not said}


def noisy(picture: Image.Image, seed: int, spread: float = 6.0) -> Image.Image:
    """With Gaussian noise of `spread` levels (of 255) on every channel."""
    levels = np.asarray(picture)
    noise = np.random.default_rng(seed).normal(0, spread, levels.shape)
    return Image.fromarray((levels + noise).clip(0, 255).astype(np.uint8))


def test_reads_drawn_scenes() -> None:
    assert right(scenes(400), lambda picture, _: picture) >= 0.99


def test_reads_through_slight_blur_and_noise() -> None:
    assert right(scenes(200), noisy) >= 0.98
    blurred = ImageFilter.GaussianBlur(1.2)
    assert right(scenes(200), lambda picture, i: noisy(picture.filter(blurred), i)) >= 0.97


def test_reads_through_a_tint() -> None:
    """Colours a little off the palette, as a decoder may make them, keep their names."""
    tinted = right(scenes(200), lambda picture, _: picture.point(lambda v: min(v * 0.93 + 8, 255)))
    assert tinted >= 0.99


def test_specks_are_no_objects() -> None:
    def specked(picture: Image.Image, seed: int) -> Image.Image:
        levels = np.array(picture)
        rng = np.random.default_rng(seed)
        for x, y in rng.integers(4, 120, (20, 2)):
            levels[y : y + 3, x : x + 2] = rng.integers(0, 255, 3)
        return Image.fromarray(levels)

    counted = [
        verdict(look(specked(draw(scene), index)), scene)["count"]
        for index, scene in enumerate(scenes(100))
    ]
    assert np.mean(counted) >= 0.97


@pytest.mark.parametrize("colour", COLOURS)
def test_a_flat_picture_has_a_background_and_nothing_else(colour: str) -> None:
    seen = look(noisy(Image.new("RGB", (192, 128), COLOURS[colour]), 0))
    assert (seen.background, seen.objects) == (colour, ())
    said = verdict(seen, Scene((RED_CIRCLE,), background=colour))
    assert [name for name, held in said.items() if held] == ["background"]


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_objects_are_measured(shape: str, canvas: tuple[int, int]) -> None:
    for size, radius in SIZES.items():
        scene = Scene((Thing(shape, "orange", size),), "yellow", "top right", canvas=canvas)
        sighting = look(draw(scene))
        (seen,) = sighting.objects
        assert (seen.shape, seen.colour, seen.size) == (shape, "orange", size)
        centre = scene.drawn[0].x, scene.drawn[0].y
        assert np.allclose((seen.x, seen.y), centre, atol=0.5)
        assert seen.radius == pytest.approx(radius, rel=0.03)
        assert seen.overlap > 0.93
        assert place_of(seen, sighting.canvas) == "top right"


def test_what_is_no_shape_has_no_name() -> None:
    levels = np.full((128, 128, 3), 250, dtype=np.uint8)
    levels[30:90, 40:46] = levels[84:90, 40:100] = (20, 20, 20)  # an angle of two thin bars
    (seen,) = look(Image.fromarray(levels)).objects
    assert (seen.shape, seen.colour) == ("", "black") and seen.overlap < 0.7


def test_two_colours_that_touch_are_two_objects() -> None:
    levels = np.full((128, 128, 3), COLOURS["white"], dtype=np.uint8)
    levels[50:80, 34:64], levels[50:80, 64:94] = COLOURS["red"], COLOURS["blue"]
    seen = look(Image.fromarray(levels)).objects
    assert {(each.shape, each.colour) for each in seen} == {("square", "red"), ("square", "blue")}


@pytest.mark.parametrize("background", ["white", "black"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_a_wrong_picture_of_two_is_judged_wrong(relation: str, background: str) -> None:
    scene = Scene((RED_CIRCLE, GREEN_SQUARE), background, relation=relation)
    circle, square = scene.things
    assert wrong(scene, scene) == set()
    swapped = replace(scene, things=(square, circle))
    assert wrong(swapped, scene) == {"relation", "everything"}
    colours = (replace(circle, colour="green"), replace(square, colour="red"))
    found = wrong(replace(scene, things=colours), scene)
    assert {"colour", "everything"} <= found and not found & {"count", "background"}
    assert wrong(replace(scene, background="pink"), scene) == {"background", "everything"}
    sizes = tuple(replace(thing, size="medium") for thing in scene.things)
    assert wrong(replace(scene, things=sizes), scene) == {"size", "everything"}
    other = next(each for each in ("left of", "above") if each[0] != relation[0])
    across = replace(scene, relation="below" if relation == "above" else other)
    assert wrong(across, scene) == {"relation", "everything"}
    missing = Scene((circle,), background, "left")
    assert wrong(missing, scene) == {"count", "shape", "colour", "size", "relation", "everything"}


def test_a_wrong_picture_of_several_is_judged_wrong() -> None:
    scene = Scene((RED_CIRCLE,), count=3)
    assert wrong(replace(scene, count=4), scene) == {"count", "everything"}
    assert "count" in wrong(replace(scene, count=2), scene)
    assert wrong(Scene((GREEN_SQUARE,), count=3), scene) == {
        "shape",
        "colour",
        "size",
        "everything",
    }
    assert "place" not in verdict(look(draw(scene)), scene)


def test_a_wrong_place_is_judged_wrong() -> None:
    scene = Scene((RED_CIRCLE,), "yellow", "bottom left")
    for place in ("left", "bottom", "centre", "top right"):
        assert wrong(replace(scene, place=place), scene) == {"place", "everything"}


def test_equal_things_are_matched_by_where_they_stand() -> None:
    """A small blue star left of a small blue star is right; which is which is not to be seen."""
    star = Thing("star", "blue")
    for relation in RELATIONS:
        scene = Scene((star, star), relation=relation)
        assert wrong(scene, scene) == set()
    large = Thing("star", "blue", "large")
    scene = Scene((star, large), relation="left of")
    assert wrong(replace(scene, things=(large, star)), scene) == {"relation", "everything"}


def test_what_a_prompt_leaves_open_is_not_judged() -> None:
    seen = look(draw(Scene((RED_CIRCLE,), "pink", "top")))
    wanted = asked("a circle")
    assert wanted is not None
    assert verdict(seen, wanted) == {"count": True, "shape": True, "everything": True}
    wanted = asked("a large circle and a square, on pink")
    assert wanted is not None
    assert verdict(seen, wanted) == {
        "background": True, "count": False, "shape": False, "size": False, "everything": False,
    }  # fmt: skip


def test_other_picture_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"128x128, 192x128, 128x192 px, not 256x128"):
        look(Image.new("RGB", (256, 128)))
