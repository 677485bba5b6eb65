"""The results of `prompt_following.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.page.tables import NONE, table

Document = Mapping[str, Any]

_MOST_WRONG = 40


def prompt_following(document: Document) -> str:
    """Shares by variant, kind, canvas and attribute; what is confused with what; what is wrong."""
    psnr = document["vae_psnr"].items()
    parts = [
        f"{document['prompts']} held-out prompts, guidance {document['guidance_scale']}. "
        "Shares of pictures that are as asked, by a detector, which reads "
        f"{_percent(document['detector']['everything'])} of {document['detector']['pictures']:,} "
        "drawn pictures right in everything.",
        _variants(document),
        _guidance(document),
        "The VAE gives held-out drawings back with a PSNR of "
        f"{', '.join(f'{decibels:.1f} dB ({canvas} px)' for canvas, decibels in psnr)}.",
    ]
    for name, seen in document["confusions"].items():
        if all(list(row) == [asked] for asked, row in seen.items()):
            parts.append(f"{name.capitalize()}: nothing was taken for anything else.")
        else:
            parts.append(f"{name.capitalize()}, asked for (rows) and seen (columns), 20 steps:")
            parts.append(_confusion(seen))
    if wrong := document["wrong"]:
        parts += ["Wrong at 20 steps:", *_wrong(wrong)]
    return "\n\n".join(parts)


def _variants(document: Document) -> str:
    rows = document["variants"]
    first = next(iter(rows.values()))
    kinds, attributes = list(first["by_kind"]), list(first["by_attribute"])
    canvases = list(first["by_canvas"])
    titles = ["", "everything", *(f"kind: {kind}" for kind in kinds), *canvases, *attributes]
    titles.append("s a picture")
    return table(
        titles,
        (
            [name, _percent(row["everything"])]
            + [_percent(row["by_kind"][kind]) for kind in kinds]
            + [_percent(row["by_canvas"][canvas]) for canvas in canvases]
            + [_percent(row["by_attribute"][each]) for each in attributes]
            + [f"{row['seconds_per_picture']:.2f}"]
            for name, row in rows.items()
        ),
    )


def _guidance(document: Document) -> str:
    negative, empty = document["negative"], document["empty"]
    return (
        f"Of {negative['pictures']} pictures of “a star”, “a circle”, … "
        f"{_percent(negative['blue_without'])} are blue, and with the negative prompt “blue” "
        f"{_percent(negative['blue_with'])}; where the negative prompt is the colour that each has "
        f"without one, {_percent(negative['own_colour_with'])} keep it, and "
        f"{_percent(negative['shape_with_own_colour'])} show the one shape asked for (without: "
        f"{_percent(negative['shape_without'])}). Of {empty['pictures']} pictures of the empty "
        f"prompt {_percent(empty['empty_is_a_scene'])} are a scene, of as many prompts without a "
        f"known word {_percent(empty['unknown_words_are_a_scene'])}."
    )


def _confusion(seen: Mapping[str, Mapping[str, int]]) -> str:
    names = sorted({name for row in seen.values() for name in row} | set(seen))
    rows = [[asked, *(str(row.get(n, "")) for n in names)] for asked, row in seen.items()]
    return table(["", *names], rows)


def _wrong(wrong: Sequence[dict[str, Any]]) -> list[str]:
    shown = [f"- “{each['prompt']}”, {each['size']}: {', '.join(each['wrong'])}" for each in wrong]
    left = len(shown) - _MOST_WRONG
    return ["\n".join(shown[:_MOST_WRONG]), *([f"And {left} more."] if left > 0 else [])]


def _percent(part: float | None) -> str:
    return NONE if part is None else f"{part:.1%}"
