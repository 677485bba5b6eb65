"""What negative prompts and the empty prompt do to the demo model: for `prompt_following.py`."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file, save_file

import lowvram
from lowvram.demo.detector import Sighting, look
from lowvram.demo.scenes import SHAPES

Draw = Callable[..., list[Image.Image]]
_EACH = 10  # pictures of each shape
_EMPTY = 40
_UNKNOWN = ("a cat", "the sea at night", "hello", "an old man with a hat", "xyzzy")


def negative_prompts(draw: Draw) -> dict[str, Any]:
    """ "a star" with and without a negative prompt, at the default guidance, the seeds the same.

    Returns:
        "blue_without" and "blue_with": the share of stars, circles, … that are blue without a
        negative prompt and with "blue"; "own_colour_with": the share that keep the colour they
        have without one where exactly that colour is the negative prompt; "shape_without" and
        "shape_with_own_colour": the share with one object of the shape that was asked for.
    """
    shapes = [shape for shape in SHAPES for _ in range(_EACH)]
    prompts, seeds = [f"a {shape}" for shape in shapes], list(range(len(shapes)))
    free = _look(draw(prompts, seeds))
    own = [_colour(seen) for seen in free]
    blue = _look(draw(prompts, seeds, negative_prompt="blue"))
    other = _look(draw(prompts, seeds, negative_prompt=own))
    return {
        "pictures": len(prompts),
        "blue_without": _share([_colour(seen) == "blue" for seen in free]),
        "blue_with": _share([_colour(seen) == "blue" for seen in blue]),
        "own_colour_with": _share(
            [_colour(seen) == name for seen, name in zip(other, own, strict=True) if name]
        ),
        "shape_without": _share(list(map(_is, free, shapes))),
        "shape_with_own_colour": _share(list(map(_is, other, shapes))),
    }


def empty_prompt(draw: Draw, model: str) -> dict[str, Any]:
    """How often the empty prompt, and one without a known word, gives a scene.

    A scene is one to four objects of known shapes. The product refuses an empty prompt, so the
    embeddings of the empty negative prompt are given as the prompt's.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "star.embeds.safetensors")
        lowvram.encode("a star", model, output=made, cache=False)
        tensors = load_file(made)
        parts = {name: tensors[f"0.negative_{name}"] for name in
                 ("prompt_embeds", "prompt_attention_mask")}  # fmt: skip
        given = Path(folder, "empty.safetensors")
        save_file({f"{prefix}{name}": part[None].repeat(_EMPTY, *[1] * part.dim())
                   for prefix in ("", "negative_") for name, part in parts.items()},
                  given)  # fmt: skip
        empty = draw(["the empty prompt"] * _EMPTY, list(range(_EMPTY)), embeds=given)
    unknown = [text for text in _UNKNOWN for _ in range(_EMPTY // len(_UNKNOWN))]
    strange = draw(unknown, list(range(len(unknown))))
    return {
        "pictures": _EMPTY,
        "empty_is_a_scene": _share([_is_scene(seen) for seen in _look(empty)]),
        "unknown_words_are_a_scene": _share([_is_scene(seen) for seen in _look(strange)]),
    }


def _look(pictures: Sequence[Image.Image]) -> list[Sighting]:
    return [look(picture) for picture in pictures]


def _colour(seen: Sighting) -> str:
    return seen.objects[0].colour if seen.objects else ""


def _is(seen: Sighting, shape: str) -> bool:
    return [each.shape for each in seen.objects] == [shape]


def _is_scene(seen: Sighting) -> bool:
    return 1 <= len(seen.objects) <= 4 and all(each.shape for each in seen.objects)


def _share(said: list[bool]) -> float:
    return round(sum(said) / max(len(said), 1), 4)
