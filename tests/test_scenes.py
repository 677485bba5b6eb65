"""The demo's scenes: what is drawn is where and as large as said, and captions say the scene."""

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from lowvram.demo.captions import (
    COLOUR_WORDS,
    COUNT_WORDS,
    FILLERS,
    RELATION_WORDS,
    SHAPE_WORDS,
    caption,
    decorated,
    fragment,
    without_colour,
)
from lowvram.demo.drawing import area, draw, outline, render
from lowvram.demo.scenes import (
    CANVASES,
    COLOURS,
    KINDS,
    LAYOUTS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    random_scene,
)

BLUE_STAR = Thing("star", "blue")
DEFAULT = Scene((BLUE_STAR,))


def covered(scene: Scene) -> np.ndarray:
    """How much of each pixel its one thing covers, 0..1, [height, width], from drawn colours."""
    pixels = np.asarray(draw(scene), dtype=np.float64)
    ground = np.array(COLOURS[scene.background])
    line = np.array(COLOURS[scene.things[0].colour]) - ground
    return (pixels - ground) @ line / (line @ line)


def combinations() -> Iterator[Scene]:
    """Every combination that the split tells apart, once."""
    things = [Thing(shape, colour) for shape in SHAPES for colour in COLOURS]
    for thing in things:
        yield from (Scene((thing,), place=place) for place in PLACES)
        yield from (Scene((thing,), count=count) for count in LAYOUTS)
    for pair in itertools.product(things, repeat=2):
        yield from (Scene(pair, relation=relation) for relation in ("left of", "above"))


def test_a_tenth_of_each_kind_is_held_out() -> None:
    found: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for scene in combinations():
        found[scene.kind].append(scene.held_out)
    assert {kind: len(each) for kind, each in found.items()} == {
        "place": 720, "count": 240, "relation": 12_800,
    }  # fmt: skip
    for kind, each in found.items():
        assert 0.06 < np.mean(each) < 0.14, kind


def test_the_split_counts_what_is_combined_and_nothing_else() -> None:
    rng = random.Random(0)
    for _ in range(500):
        scene = random_scene(rng)
        other = replace(
            scene,
            things=tuple(replace(thing, size=rng.choice(list(SIZES))) for thing in scene.things),
            background=rng.choice(list(COLOURS)),
            canvas=rng.choice(CANVASES),
            jitter=(),
        )
        assert other.held_out == scene.held_out


@pytest.mark.parametrize(("one", "other"), [("left of", "right of"), ("above", "below")])
def test_the_same_picture_told_the_other_way_round_is_on_the_same_side(
    one: str, other: str
) -> None:
    rng = random.Random(1)
    for _ in range(500):
        first, second = (Thing(rng.choice(SHAPES), rng.choice(list(COLOURS))) for _ in range(2))
        said = Scene((first, second), relation=one)
        turned = Scene((second, first), relation=other)
        assert said.held_out == turned.held_out
        assert sorted(said.drawn, key=repr) == sorted(turned.drawn, key=repr)


def test_random_scenes_keep_their_side_kind_and_canvas() -> None:
    rng = random.Random(2)
    assert not any(random_scene(rng).held_out for _ in range(1000))
    assert all(random_scene(rng, held_out=True).held_out for _ in range(1000))
    for kind, canvas in itertools.product(KINDS, CANVASES):
        scene = random_scene(rng, kind=kind, canvas=canvas)
        assert (scene.kind, scene.canvas) == (kind, canvas)
    kinds = [random_scene(rng).kind for _ in range(2000)]
    assert kinds.count("place") > kinds.count("relation") > kinds.count("count") > 350


def test_the_split_is_stable() -> None:
    """A changed hash would turn training scenes into test scenes without anyone noticing."""
    held = [scene for scene in combinations() if scene.held_out]
    first = {kind: next(scene for scene in held if scene.kind == kind) for kind in KINDS}
    assert len(held) == 1432
    assert {kind: (scene.things, scene.place, scene.count) for kind, scene in first.items()} == {
        "place": ((Thing("circle", "green"),), "top", 1),
        "count": ((Thing("circle", "blue"),), "centre", 3),
        "relation": ((Thing("circle", "red"), Thing("circle", "yellow")), "centre", 1),
    }


def test_objects_stay_on_the_canvas_and_apart() -> None:
    rng = random.Random(3)
    for _ in range(2000):
        scene = random_scene(rng)
        width, height = scene.canvas
        for drawn in scene.drawn:
            reach = 1.1 * drawn.radius
            assert min(drawn.x, width - drawn.x, drawn.y, height - drawn.y) - reach > -3
        for one, other in itertools.combinations(scene.drawn, 2):
            assert max(abs(one.x - other.x), abs(one.y - other.y)) > 0.94 * 64


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_objects_are_centred_and_sized_as_said(shape: str, canvas: tuple[int, int]) -> None:
    areas = []
    for size, radius in SIZES.items():
        thing = Thing(shape, "black", size)
        cover = covered(Scene((thing,), "yellow", "bottom left", canvas=canvas))
        assert cover.shape == canvas[::-1]
        rows, columns = np.nonzero(cover > 0.5)
        middle = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
        centre = 0.25 * canvas[0], 0.75 * canvas[1]
        assert np.allclose(middle, centre, atol=0.15 * radius + 1)
        assert 1.5 * radius < np.ptp(columns) + 1 < 2.2 * radius
        assert cover.sum() == pytest.approx(area(shape) * radius**2, rel=0.02)
        areas.append(cover.sum())
    assert areas[0] * 1.5 < areas[1] and areas[1] * 1.5 < areas[2]


def test_edges_are_anti_aliased_and_clean() -> None:
    """A pixel that is neither inside nor outside lies on the edge, one for each px of it."""
    cover = covered(Scene((Thing("circle", "black", "large"),), jitter=((0.3, -0.4, 1.0),)))
    edge = cover[(cover > 0.02) & (cover < 0.98)]
    assert len(np.unique(edge.round(2))) > 20
    assert len(edge) < 1.5 * 2 * np.pi * 0.95 * SIZES["large"]


def test_a_ring_has_a_hole() -> None:
    cover = covered(Scene((Thing("ring", "black", "large"),)))
    assert abs(cover[64, 64]) < 0.01 and cover[64, 64 + 20] > 0.99


def test_several_things_stand_where_said() -> None:
    red, green = Thing("square", "red"), Thing("circle", "green")
    for relation, (first, second) in RELATIONS.items():
        for canvas in CANVASES:
            pixels = np.asarray(
                draw(Scene((red, green), "white", relation=relation, canvas=canvas))
            )
            for (x, y), thing in ((first, red), (second, green)):
                at = pixels[int(y * canvas[1]), int(x * canvas[0])]
                assert tuple(at) == COLOURS[thing.colour], relation
    for count, centres in LAYOUTS.items():
        scene = Scene((green,), "white", count=count)
        assert len(scene.drawn) == count == len(centres)
        assert covered(scene).sum() == pytest.approx(
            count * covered(replace(scene, count=1)).sum(), rel=0.01
        )


def test_many_are_drawn_at_once_as_one_by_one() -> None:
    rng = random.Random(4)
    scenes = [random_scene(rng, canvas=(192, 128)) for _ in range(20)]
    together = render(scenes)
    assert together.shape == (20, 3, 128, 192)
    for scene, pixels in zip(scenes, together, strict=True):
        assert torch.equal(pixels, render([scene])[0])


def test_jitter_moves_and_stretches() -> None:
    still = covered(DEFAULT)
    moved = covered(replace(DEFAULT, jitter=((2.0, 0.0, 1.0),)))
    assert np.allclose(np.roll(still, 2, axis=1), moved, atol=0.01)
    larger = covered(replace(DEFAULT, jitter=((0.0, 0.0, 1.05),)))
    assert larger.sum() == pytest.approx(1.05**2 * still.sum(), rel=0.01)


def test_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="octagon"):
        outline("octagon")


def names(text: str, words: dict[str, tuple[str, ...]]) -> list[str]:
    """What a text names of these, in order; the longest word first."""
    known = {word: name for name, each in words.items() for word in each}
    longest = sorted(known, key=len, reverse=True)
    return [known[word] for word in re.findall(rf"\b(?:{'|'.join(longest)})\b", text)]


SHAPES_SAID = {
    shape: tuple(itertools.chain.from_iterable(pairs)) for shape, pairs in SHAPE_WORDS.items()
}


def test_captions_name_every_shape_and_colour_and_no_other() -> None:
    rng = random.Random(5)
    for _ in range(4000):
        scene = random_scene(rng)
        text = caption(scene, rng)
        assert text == text.lower().strip() and "  " not in text and not text.endswith(",")
        assert sorted(names(text, SHAPES_SAID)) == sorted(thing.shape for thing in scene.things)
        colours = sorted(names(text, COLOUR_WORDS))
        things = sorted(thing.colour for thing in scene.things)
        assert colours in (sorted([*things, scene.background]), things), text
        assert colours != things or scene.background == "white", text


def test_what_goes_unsaid_is_the_default() -> None:
    rng = random.Random(6)
    sizes = r"\b(small|tiny|little|large|big|huge)\b"
    places = r"\b(top|bottom|upper|lower|left|right)\b"
    for _ in range(2000):
        scene = random_scene(rng, kind="place")
        text = caption(scene, rng)
        assert bool(re.search(sizes, text)) == (scene.things[0].size != "medium"), text
        assert bool(re.search(places, text)) == (scene.place != "centre"), text


def test_captions_say_how_many_and_where() -> None:
    rng = random.Random(7)
    for _ in range(1000):
        scene = random_scene(rng, kind="count")
        said = COUNT_WORDS[scene.count]
        assert re.search(rf"\b(?:{'|'.join(said)})\b", caption(scene, rng))
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    sides = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}
    for _ in range(2000):
        scene = random_scene(rng, kind="relation")
        text = caption(scene, rng)
        said = (*RELATION_WORDS[scene.relation], *RELATION_WORDS[opposite[scene.relation]])
        told = re.search(rf"\b(?:{'|'.join(said)}|{sides[scene.relation]})\b", text)
        assert told or scene.relation == "left of", text  # "a star and a ring" leaves it unsaid


def test_captions_are_many_and_their_articles_right() -> None:
    rng = random.Random(8)
    texts = {caption(DEFAULT, rng) for _ in range(800)}
    assert len(texts) > 100
    assert "a blue star" in texts  # all that is default left out
    for _ in range(3000):
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption(random_scene(rng), rng))


def test_decoration_keeps_the_caption_and_adds_no_known_word() -> None:
    rng = random.Random(9)
    for _ in range(1000):
        plain = caption(random_scene(rng), rng)
        text = decorated(plain, rng)
        left = iter(re.findall(r"[\w-]+", text))
        assert all(word in left for word in re.findall(r"[\w-]+", plain)), (plain, text)
        assert len(text) > len(plain)
    for filler in FILLERS:
        assert not names(filler, SHAPES_SAID) and not names(filler, COLOUR_WORDS)


def test_fragments_are_true() -> None:
    rng = random.Random(10)
    texts = set()
    for _ in range(3000):
        scene = random_scene(rng)
        text = fragment(scene, rng)
        shapes = {thing.shape for thing in scene.things}
        colours = {thing.colour for thing in scene.things} | {scene.background}
        assert set(names(text, SHAPES_SAID)) <= shapes, text
        assert set(names(text, COLOUR_WORDS)) <= colours, text
        texts.add(text)
    assert {"blue", "star", "two"} <= texts
    # A colour and a shape is a whole caption: what else it does not say is as usual.
    assert not {"a blue star", "blue star"} & texts


def test_a_caption_can_leave_the_colour_out() -> None:
    assert without_colour("an orange star on white", "orange") == "a star on white"
    assert without_colour("a small box in gray, on grey", "grey") == "a small box, on grey"
    assert without_colour("two violet rings on pink", "purple") == "two rings on pink"
