"""The demo's scenes: what is drawn is where and as large as said, and captions say the scene."""

import random
import re

import numpy as np
import pytest

from lowvram.demo.scenes import (
    CANVAS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    all_scenes,
    caption,
    draw,
    outline,
    random_scene,
    shape_mask,
)

DEFAULT = Scene("star", "blue", "white", "centre", "medium")


def coverage(scene: Scene) -> np.ndarray:
    """How much of each pixel the object covers, 0..1, [128, 128], from the drawn colours."""
    pixels = np.asarray(draw(scene), dtype=np.float64)
    ground, ink = (np.array(COLOURS[name]) for name in (scene.background, scene.colour))
    line = ink - ground
    return (pixels - ground) @ line / (line @ line)


def test_split_is_a_partition_with_a_tenth_held_out() -> None:
    held_out, seen = set(all_scenes(held_out=True)), set(all_scenes(held_out=False))
    assert not held_out & seen
    assert len(held_out) + len(seen) == 6 * 8 * 7 * 9 * 3
    assert 0.08 < len(held_out) / len(seen | held_out) < 0.12


def test_split_does_not_depend_on_jitter_and_never_leaks() -> None:
    rng = random.Random(0)
    assert not any(random_scene(rng).held_out for _ in range(2000))
    assert all(random_scene(rng, held_out=True).held_out for _ in range(2000))


def test_split_is_stable() -> None:
    """A changed hash would turn training scenes into test scenes without anyone noticing."""
    assert [scene.said for scene in all_scenes(held_out=True)[:2]] == [
        ("circle", "red", "green", "top left", "medium"),
        ("circle", "red", "green", "top left", "large"),
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", PLACES)
def test_even_the_largest_object_is_nearly_all_on_the_canvas(shape: str, place: str) -> None:
    x, y = PLACES[place]
    reach = [(x + 30 * px, y + 30 * py) for px, py in outline(shape)]
    assert max(abs(value - CANVAS / 2) for point in reach for value in point) < CANVAS / 2 + 2


@pytest.mark.parametrize("shape", SHAPES)
def test_objects_are_centred_and_sized_as_said(shape: str) -> None:
    areas = []
    for size, radius in SIZES.items():
        cover = coverage(Scene(shape, "black", "yellow", "bottom left", size))
        rows, columns = np.nonzero(cover > 0.5)
        middle = ((columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2)
        assert np.allclose(middle, PLACES["bottom left"], atol=0.15 * radius + 1)
        assert 1.5 * radius < np.ptp(columns) + 1 < 2.2 * radius
        areas.append(cover.sum())
    assert areas[0] * 1.5 < areas[1] and areas[1] * 1.5 < areas[2]


def test_jitter_moves_and_stretches() -> None:
    still = coverage(DEFAULT)
    moved = coverage(Scene(*DEFAULT.said, shift_x=2.0))
    assert np.allclose(np.roll(still, 2, axis=1), moved, atol=0.01)
    assert coverage(Scene(*DEFAULT.said, stretch=1.05)).sum() > 1.05 * still.sum()


def test_edges_are_anti_aliased() -> None:
    cover = np.asarray(shape_mask("circle", 64.0, 64.0, 20.0))
    assert len(np.unique(cover)) > 8


def test_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="octagon"):
        outline("octagon")


def test_captions_name_shape_and_both_colours() -> None:
    rng = random.Random(1)
    other = {"circle": "disc", "cross": "plus sign"}
    for _ in range(3000):
        scene = random_scene(rng)
        text = caption(scene, rng)
        assert text == text.lower().strip() and "  " not in text and not text.endswith(",")
        assert scene.shape in text or other.get(scene.shape, "never") in text
        assert re.search(rf"\b{scene.colour}\b", text)
        assert scene.background == "white" or re.search(rf"\b{scene.background}\b", text)
        assert set(re.findall("|".join(COLOURS), text)) <= {scene.colour, scene.background}


def test_captions_leave_out_only_what_is_default() -> None:
    rng = random.Random(2)
    sizes = r"\b(small|tiny|little|large|big|huge)\b"
    places = r"\b(top|bottom|upper|lower|left|right)\b"
    for _ in range(3000):
        scene = random_scene(rng)
        text = caption(scene, rng)
        assert bool(re.search(sizes, text)) == (scene.size != "medium"), text
        assert bool(re.search(places, text)) == (scene.place != "centre"), text


def test_captions_are_many_and_their_articles_right() -> None:
    rng = random.Random(3)
    texts = {caption(DEFAULT, rng) for _ in range(500)}
    assert len(texts) > 60
    assert "a blue star" in texts  # all that is default left out
    for _ in range(2000):
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption(random_scene(rng), rng))
