"""Prompts in the demo's words are read back as what they say; anything else is not read."""

import random

import pytest

from lowvram.demo.reading import ATTRIBUTES, asked
from lowvram.demo.scenes import all_scenes, caption

LEFT_OPEN = {"background": "white", "place": "centre", "size": "medium"}


def test_every_caption_is_read_back() -> None:
    """What is not said is what the demo draws when it is left open, and nothing is misread."""
    rng = random.Random(0)
    unsaid = 0
    for scene in (*all_scenes(True), *all_scenes(False)):
        text = caption(scene, rng)
        found = asked(text)
        assert found is not None, text
        assert {"shape", "colour"} <= set(found), text
        assert LEFT_OPEN | found == dict(zip(ATTRIBUTES, scene.said, strict=True)), text
        unsaid += len(found) < 5
    assert unsaid > 500


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a large blue star on a yellow background", ("star", "blue", "yellow", None, "large")),
        ("A red heart on a white background.", ("heart", "red", "white", None, None)),
        ("circle", ("circle", None, None, None, None)),
    ],
)
def test_what_is_left_open_is_not_asked_for(prompt: str, said: tuple[str | None, ...]) -> None:
    pairs = zip(ATTRIBUTES, said, strict=True)
    assert asked(prompt) == {name: value for name, value in pairs if value is not None}


@pytest.mark.parametrize(
    "prompt",
    [
        "a small cactus with a happy face",
        "a red circle and a blue star",
        "a blue star, not red",
        "a blue blue star",
        "a blue star star",
        "a large small star",
        "a blue star on a red background on a white background",
        "a blue star in the top left corner, bottom",
        "a blue starfish",
        "on a red background",
        "",
    ],
)
def test_what_the_demo_does_not_know_is_not_read(prompt: str) -> None:
    assert asked(prompt) is None
