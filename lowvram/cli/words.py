"""The command line's words as the keyword arguments of the functions they are for."""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lowvram.errors import RequestError
from lowvram.families.family import Size
from lowvram.memory.budget import parse_bytes
from lowvram.request.seeds import MAX_IMAGES

Number = TypeVar("Number", int, float)


def to_options(given: Mapping[str, Any], but: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a command was given, by the names and in the types of Python.

    All of it: what a command declares cannot be forgotten on the way.

    Args:
        given: the command's parameters, as `locals()` has them in its first line.
        but: those that are left out.

    Raises:
        RequestError: a text cannot be read.
    """
    options = {
        option_name(name): _READ[name](value) if name in _READ else value
        for name, value in given.items()
        if name not in (*but, "karras")
    }
    if "karras" in given:
        options["sigma_spacing"] = parse_sigma_spacing(given["sigma_spacing"], given["karras"])
    return options


def option_name(parameter: str) -> str:
    """The name in Python of what a command calls so."""
    return _NAMES.get(parameter, parameter)


def parse_size(text: str | None) -> Size | None:
    """Width and height from "WxH" in px; None stays None.

    Raises:
        RequestError: not of that form.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX×]\s*(\d{1,6})\s*", text)
    if match is None:
        raise RequestError(f"size {text!r} is not WIDTHxHEIGHT: for example 1024x768")
    return Size(int(match[1]), int(match[2]))


def parse_seeds(text: str) -> int | list[int]:
    """A seed, or a list with ranges: "7", "1,2,5", "3-6".

    Raises:
        RequestError: not of that form, or more than `MAX_IMAGES`.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,19})(?:\s*-\s*(\d{1,19}))?\s*", part)
        first = int(match[1]) if match else 0
        last = int(match[2] or match[1]) if match else -1
        if last < first or last - first >= MAX_IMAGES:
            raise RequestError(f"seed {text!r} is not a number, list or range: 7, 1,2,5 or 3-6")
        seeds += range(first, last + 1)
    return seeds[0] if len(seeds) == 1 else seeds


def parse_sigma_spacing(text: str, karras: bool | None) -> str:
    """The spacing of noise levels from its two options.

    Raises:
        RequestError: both are given.
    """
    if karras is None:
        return text
    if text:
        raise RequestError("--karras is short for --sigma-spacing karras: give one of them")
    return "karras" if karras else "plain"


def parse_numbers(option: str, text: str | None, kind: type[Number]) -> list[Number] | None:
    """Comma-separated numbers of a kind, int or float; None stays None.

    Raises:
        RequestError: something in it is no such number.
    """
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        example = "999,750,500" if kind is int else "0.25,0.5"
        raise RequestError(f"{option} {text!r} is not a list of {what}: {example}") from None


def parse_list(option: str, text: str | None) -> list[str]:
    """Comma-separated words; none for None.

    Raises:
        RequestError: there is nothing between two commas.
    """
    words = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(words):
        raise RequestError(f"{option} {text!r} is not a list: whole,8bit")
    return words


# The names in Python, where a parameter has another one.
_NAMES = {
    "negative": "negative_prompt",
    "clean": "clean_caption",
    "images": "images_per_prompt",
    "guidance": "guidance_scale",
    "aesthetic": "aesthetic_scores",
    "pixels": "decode",
    "unet_weights": "transformer_weights",
}
_READ: dict[str, Callable[[Any], Any]] = {
    "seed": parse_seeds,
    "size": parse_size,
    "timesteps": lambda text: parse_numbers("--timesteps", text, int),
    "sigmas": lambda text: parse_numbers("--sigmas", text, float),
    "at": lambda text: parse_numbers("--at", text, float),
    "aesthetic": lambda text: parse_numbers("--aesthetic", text, float),
    "vram": lambda text: parse_bytes("--vram", text),
    "stage_budget": lambda text: parse_bytes("--stage-budget", text),
}
