"""The results of `prompt_following.py` as a page of tables in Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

_MOST_WRONG = 40


def page(document: dict[str, Any]) -> str:
    """Every number of the document that a reader wants."""
    at = document["machine"]
    parts = [
        "# Prompt following of the demo model",
        f"`benchmarks/prompt_following.py`, {document['date']}, model {document['model']}, "
        f"{document['prompts']} held-out prompts, guidance {document['guidance_scale']}, "
        f"{at['cores']} cores ({at['cpu']}). Shares of pictures that are as asked.",
        _variants(document),
        f"The detector reads {document['detector']['everything']:.1%} of "
        f"{document['detector']['pictures']:,} drawn pictures right in everything.",
    ]
    if "negative" in document:
        parts += [_guidance(document)]
    for name, table in document.get("confusions", {}).items():
        parts += [f"## {name.capitalize()}: asked for (rows), seen (columns)", _confusion(table)]
    if wrong := document.get("wrong"):
        parts += ["## Wrong at 20 steps", *_wrong(wrong)]
    return "\n\n".join(parts) + "\n"


def _variants(document: dict[str, Any]) -> str:
    rows = document["variants"]
    first = next(iter(rows.values()))
    kinds, attributes = list(first["by_kind"]), list(first["by_attribute"])
    canvases = list(first["by_canvas"])
    titles = ["", "everything", *(f"kind: {kind}" for kind in kinds), *canvases, *attributes, "s"]
    return _table(
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


def _guidance(document: dict[str, Any]) -> str:
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


def _confusion(table: dict[str, dict[str, int]]) -> str:
    names = sorted({name for row in table.values() for name in row} | set(table))
    return _table(
        ["", *names],
        ([asked, *(str(row.get(n, "")) for n in names)] for asked, row in table.items()),
    )


def _wrong(wrong: Sequence[dict[str, Any]]) -> list[str]:
    shown = [f"- “{each['prompt']}”, {each['size']}: {', '.join(each['wrong'])}" for each in wrong]
    left = len(shown) - _MOST_WRONG
    return ["\n".join(shown[:_MOST_WRONG]), *([f"And {left} more."] if left > 0 else [])]


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
