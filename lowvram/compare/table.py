"""A comparison as two tables for people: how far each variant is, and what it took."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowvram.memory.report import cells, readable

if TYPE_CHECKING:
    from lowvram.compare.comparison import Compared, Comparison
    from lowvram.compare.differences import Following

_SAME = "="
_FAR = ("cosine", "error", "latents", "PSNR", "worst", "SSIM", "FLIP", "levels", "as asked")
_TITLES = {  # what stands above a column, and above those of one kind
    "cosine": "embeds",
    "latents": "latents",
    "PSNR": "pictures",
    "as asked": "found",
}
_WORDS = 3  # columns of words in a table of stages: stage, weights, dtype


def table(comparison: "Comparison") -> str:
    """Both tables, and notes below each."""
    shown = [row for row in comparison.rows if not row.failed]
    parts = ["\n".join(heading(comparison)), _aligned(far(shown), 1), "\n".join(notes(comparison))]
    parts += [_aligned(took(shown), 1 + _WORDS), "\n".join(failures(comparison))]
    return "\n\n".join(part for part in parts if part)


def heading(comparison: "Comparison") -> list[str]:
    """What is the reference; the model and the pictures."""
    items, first = comparison.items, comparison.items[0]
    told = [
        comparison.model,
        f"{_count(len(items), 'picture')} of {first['width']}x{first['height']} px",
        _count(len({item["prompt"] for item in items}), "prompt"),
        _count(len({item["seed"] for item in items}), "seed"),
    ]
    return [comparison.rows[0].variant.title, ", ".join(told)]


def failures(comparison: "Comparison") -> list[str]:
    """Each variant that could not be carried out, and why."""
    return [f"{row.variant.name}: {row.failed}" for row in comparison.rows if row.failed]


def far(rows: "Sequence[Compared]") -> list[list[str]]:
    """How far each is from the reference: titles in two lines, then a line each.

    A column that no row knows is left out.
    """
    lines = [_far(row) for row in rows]
    measured = [row.pictures.flip is not None for row in rows if row.pictures is not None]
    left_out = "" if any(measured) else "FLIP"
    kept = [name for name in _FAR if name != left_out and any(line.get(name) for line in lines)]
    titles = [["", *(_TITLES.get(name, "") for name in kept)], ["", *kept]]
    body = [[row.variant.name, *(line.get(name, "") for name in kept)] for row, line in
            zip(rows, lines, strict=True)]  # fmt: skip
    return titles + body


def _far(row: "Compared") -> dict[str, str]:
    """The cells of a row; "=" for what is the reference's own, or equal to it bit for bit."""
    if row.variant.name == "reference":
        return {"as asked": found(row.following)} if row.following else {}
    embeds, latents, pictures = row.embeds, row.latents, row.pictures
    line = dict.fromkeys(_FAR[:-1], _SAME)
    if embeds is not None and not embeds.equal:
        line |= {"cosine": near_one(embeds.cosine), "error": small(embeds.error)}
    if latents is not None and not latents.equal:
        line["latents"] = small(latents.error)
    if pictures is not None and not pictures.equal:
        line |= {
            "PSNR": decibels(pictures.psnr),
            "worst": decibels(pictures.psnr_worst),
            "SSIM": near_one(pictures.ssim),
            "FLIP": "" if pictures.flip is None else small(pictures.flip),
            "levels": str(pictures.largest),
        }
    return line | ({"as asked": found(row.following)} if row.following else {})


def notes(comparison: "Comparison") -> list[str]:
    """What the columns leave out: which token is worst, what was not judged or not measured."""
    said = [
        "= equal bit for bit, pictures as written; errors are relative, means of tokens or pictures"
    ]
    far_pictures = False
    for row in comparison.rows:
        embeds, latents, pictures = row.embeds, row.latents, row.pictures
        told = []
        if embeds is not None and not embeds.equal:
            told.append(
                f"worst token “{embeds.worst_token}” of “{_cut(embeds.worst_text)}”: "
                f"error {small(embeds.error_worst)}; smallest cosine "
                f"{near_one(embeds.cosine_worst)}"
            )
        if latents is not None and len(latents.errors) > 1 and not latents.equal:
            told.append(f"worst latents {small(latents.error_worst)}")
        if pictures is not None and not pictures.equal:
            far_pictures |= pictures.flip is None
            if pictures.differing < len(pictures.pictures):
                told.append(f"{pictures.differing} of {len(pictures.pictures)} pictures differ")
        if told:
            said.append(f"{row.variant.name}: {'; '.join(told)}")
    if far_pictures:
        from lowvram.compare.perceptual import MISSING

        said.append(MISSING)
    if comparison.model == "demo":
        said += _judged(comparison)
    return said


def _judged(comparison: "Comparison") -> list[str]:
    following = comparison.rows[0].following
    if following is None:
        return ["as asked: not judged, prompts not in the demo's words, or not at its sizes"]
    left = following.pictures - following.judged
    if left:
        return [f"as asked: {left} of {following.pictures} pictures not judged, their prompts are "
                "not in the demo's words"]  # fmt: skip
    return []


def took(rows: "Sequence[Compared]") -> list[list[str]]:
    """What each stage took: of a variant those that it carried out itself."""
    stages = [(row, each) for row in rows for each in row.stages if each.of == row.variant.name]
    # What was foretold is in the document: here it would double the columns.
    table = cells([{**each.report, "predicted": None} for _, each in stages])
    names, held = [""], ["held"]
    for row, each in stages:
        names.append(row.variant.name if row.variant.name not in names else "")
        held.append(readable("weights_bytes", each.report["weights_bytes"]))
    return [
        [name, *line[:_WORDS], weights, *line[_WORDS:]]
        for name, line, weights in zip(names, table, held, strict=True)
    ]


def small(value: float) -> str:
    """A number that may be tiny: two figures, never 0 unless it is."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "infinite"
    return f"{value:.2g}" if 1e-4 <= abs(value) < 1e4 else f"{value:.1e}".replace("e-0", "e-")


def near_one(value: float) -> str:
    """A number that may be nearly 1: never 1 unless it is."""
    if value == 1:
        return "1"
    return f"{value:.4f}" if 1 - value >= 5e-4 else f"1 - {small(1 - value)}"


def decibels(value: float) -> str:
    """A PSNR."""
    return _SAME if math.isinf(value) else f"{value:.1f} dB"


def found(following: "Following | None") -> str:
    """Of what was asked for."""
    return "" if following is None else f"{following.found} of {following.asked}"


def _aligned(lines: Sequence[Sequence[str]], texts: int) -> str:
    """Words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"
