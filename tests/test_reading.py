"""Prompts in the demo's words are read back as what they say; anything else is not read."""

import random
import subprocess
import sys

import pytest

from lowvram.demo.captions import FILLERS, caption, fragment
from lowvram.demo.reading import VOCABULARY, Asked, Wanted, asked, understands
from lowvram.demo.scenes import COLOURS, PLACES, RELATIONS, SHAPES, SIZES, Scene, random_scene


def agrees(found: Asked, scene: Scene) -> bool:
    """What is not said is what the demo draws when it is left open, and nothing is misread."""
    said = Asked.of(scene)
    things = [(thing.shape, thing.colour, thing.size or "medium") for thing in found.things]
    return (
        things == [(thing.shape, thing.colour, thing.size) for thing in said.things]
        and (found.background or "white") == said.background
        and found.count == said.count
        and (found.place or ("centre" if scene.kind == "place" else None)) == said.place
        # "a star and a ring" says no more than that there are both
        and found.relation in (said.relation, None if said.relation == "left of" else "")
    )


def test_captions_are_read_back() -> None:
    rng = random.Random(0)
    read = unsaid = 0
    for index in range(4000):
        scene = random_scene(rng, held_out=bool(index % 2))
        text = caption(scene, rng)
        found = asked(text)
        assert understands(text)
        if found is not None:
            read += 1
            unsaid += found.background is None
            assert agrees(found, scene), (text, found)
    assert read >= 0.99 * 4000
    assert unsaid > 100


STAR = Wanted("star", "blue")


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (
            "a large blue star on a yellow background",
            Asked((Wanted("star", "blue", "large"),), "yellow"),
        ),
        ("A red heart on a white background.", Asked((Wanted("heart", "red"),), "white")),
        ("circle", Asked((Wanted("circle"),))),
        ("backdrop of gray, 3 tiny dots", Asked((Wanted("circle", None, "small"),), "grey", 3)),
        ("a pair of violet hoops", Asked((Wanted("ring", "purple"),), count=2)),
        ("upper left corner, a star in blue", Asked((STAR,), place="top left")),
        ("a blue star, large, in the middle", Asked((Wanted("star", "blue", "large"),),
                                                    place="centre")),
        ("a blue star above a box", Asked((STAR, Wanted("square")), relation="above")),
        ("under a box is a blue star", Asked((STAR, Wanted("square")), relation="below")),
        ("a blue star with a box below it", Asked((STAR, Wanted("square")), relation="above")),
        ("on the right a blue star, on the left a box",
         Asked((STAR, Wanted("square")), relation="right of")),
        ("a blue star at the bottom and a box at the top",
         Asked((STAR, Wanted("square")), relation="below")),
        ("a blue star and a box", Asked((STAR, Wanted("square")))),
    ],
)  # fmt: skip
def test_what_is_left_open_is_not_asked_for(prompt: str, said: Asked) -> None:
    assert asked(prompt) == said


@pytest.mark.parametrize(
    "prompt",
    [
        "a small cactus with a happy face",
        "a blue star, not red",
        "a blue blue star",
        "a blue star star",
        "a large small star",
        "a large blue star, small",
        "a blue star on a red background on a white background",
        "a blue star in the top left corner, bottom",
        "a circle on the left and a star at the top",
        "a blue starfish",
        "a star on a red circle",
        "a star on red circle",
        "blue stars",
        "two star",
        "two stars left of a ring",
        "three circles at the top",
        "a red circle, a blue star and a ring",
        "on a red background",
        "",
    ],
)
def test_what_the_demo_does_not_know_is_not_read(prompt: str) -> None:
    assert asked(prompt) is None


def test_a_known_word_is_enough_to_be_understood() -> None:
    rng = random.Random(1)
    for _ in range(1000):
        assert understands(fragment(random_scene(rng), rng))
    for word in (
        "Blue",
        "tiny",
        "PLUS",
        "hearts",
        "two",
        "below",
        "middle",
        "a backdrop",
        "top-left",
    ):
        assert understands(word.replace("-", " ")), word
    for text in (*FILLERS, "a cat", "the sea at night", "blueberry", "startle", "someone", "a", ""):
        assert not understands(text), text


def test_the_vocabulary_is_one_line_that_names_all() -> None:
    assert "\n" not in VOCABULARY
    for name in (*SHAPES, *COLOURS, *SIZES, *PLACES, *RELATIONS):
        assert name in VOCABULARY


def test_reading_needs_no_torch() -> None:
    code = "import sys, lowvram.demo.reading; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
