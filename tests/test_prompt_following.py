"""The benchmark's counting and its pages, on drawn pictures: no model draws here."""

from dataclasses import replace

from PIL import Image

from benchmarks.page.following import prompt_following
from benchmarks.prompt_following import confusions, held_out_prompts, shares
from lowvram.demo.detector import look
from lowvram.demo.drawing import draw
from lowvram.demo.pictures import captioned
from lowvram.demo.reading import asked
from lowvram.demo.scenes import CANVASES, KINDS, Thing


def test_prompts_are_held_out_and_the_same_every_time() -> None:
    prompts = held_out_prompts(300, seed=0)
    assert prompts == held_out_prompts(300, seed=0)
    assert all(scene.held_out for scene, _ in prompts)
    assert {scene.kind for scene, _ in prompts} == set(KINDS)
    assert {scene.canvas for scene, _ in prompts} == set(CANVASES)
    assert sum(asked(prompt) is not None for _, prompt in prompts) >= 297
    assert {scene.canvas for scene, _ in held_out_prompts(9, 1, (128, 192))} == {(128, 192)}


def test_what_is_wrong_is_counted_where_it_belongs() -> None:
    scenes = [scene for scene, _ in held_out_prompts(60, seed=1)]
    found = shares(scenes, [look(draw(scene)) for scene in scenes])
    assert found["everything"] == 1
    assert set(found["by_kind"].values()) | set(found["by_attribute"].values()) == {1}
    pairs = [scene for scene in scenes if scene.kind == "relation" and _differ(*scene.things)]
    turned = [replace(scene, things=scene.things[::-1]) for scene in pairs]
    sightings = [look(draw(scene)) for scene in turned]
    found = shares(pairs, sightings)
    assert found["by_attribute"]["relation"] == 0
    assert found["by_attribute"]["shape"] == found["by_attribute"]["count"] == 1
    assert found["by_attribute"]["place"] is None and found["by_kind"]["place"] is None
    table = confusions(pairs, sightings)["relation"]
    assert set(table["left of"]) == {"right of"} and set(table["above"]) == {"below"}


def _differ(one: Thing, other: Thing) -> bool:
    """Whether they can be told apart; the judge matches by shape and colour before size."""
    return (one.shape, one.colour) != (other.shape, other.colour)


def test_missing_objects_are_in_the_table() -> None:
    scenes = [scene for scene, _ in held_out_prompts(20, seed=2) if scene.kind == "place"]
    flat = look(Image.new("RGB", (128, 128), "white"))
    tables = confusions(scenes, [flat] * len(scenes))
    for name in ("shape", "colour", "size", "place"):
        assert all(set(row) == {"missing"} for row in tables[name].values())
    assert tables["count"] == {"1": {"0": len(scenes)}}


def test_the_page_shows_every_variant_and_table() -> None:
    asked_for = held_out_prompts(30, seed=3)
    scenes = [scene for scene, _ in asked_for]
    sightings = [look(draw(scene)) for scene in scenes]
    row = shares(scenes, sightings) | {"seconds_per_picture": 0.5}
    swapped = [look(draw(scene)) for scene in reversed(scenes)]
    document = {
        "prompts": 30, "guidance_scale": 2.0, "detector": row | {"pictures": 1000},
        "variants": {"20 steps": row, "8 steps": row},
        "confusions": {**confusions(scenes, sightings), **_only(confusions(scenes, swapped))},
        "wrong": [{"prompt": "a star", "size": "128x128", "wrong": ["shape", "size"]}] * 41,
        "vae_psnr": {"128x128": 37.87},
        "negative": dict.fromkeys(NEGATIVE, 0.5) | {"pictures": 80},
        "empty": {"pictures": 40, "empty_is_a_scene": 1.0, "unknown_words_are_a_scene": 0.9},
    }  # fmt: skip
    text = prompt_following(document)
    assert "| 20 steps | 100.0% |" in text and "| 8 steps | 100.0% |" in text
    assert "- “a star”, 128x128: shape, size" in text and "And 1 more." in text
    assert "Shape, asked for (rows)" in text and "Colour: nothing was taken" in text
    assert "37.9 dB (128x128 px)" in text and "90.0%" in text
    rows = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert min(rows) > 3


NEGATIVE = ("blue_without", "blue_with", "own_colour_with", "shape_without",
            "shape_with_own_colour")  # fmt: skip


def _only(tables: dict[str, dict[str, dict[str, int]]]) -> dict[str, dict[str, dict[str, int]]]:
    return {"shape": tables["shape"]}


def test_pictures_stand_above_their_texts() -> None:
    red, blue = Image.new("RGB", (128, 192), "red"), Image.new("RGB", (192, 128), "blue")
    paper = captioned([red, blue, red], ["one", "a text " * 20, "three"], columns=2, scale=2)
    colours = dict((colour, count) for count, colour in paper.getcolors(1 << 24))
    assert colours[(255, 0, 0)] == 2 * 4 * 128 * 192 and colours[(0, 0, 255)] == 4 * 192 * 128
    assert any(sum(colour) < 200 for colour in colours)  # letters
    assert paper.getpixel((0, 0)) == paper.getpixel((paper.width - 1, paper.height - 1))
