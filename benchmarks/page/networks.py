"""Results about single networks and methods as tables."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.page.tables import NONE, folded, gigabytes, seconds, share, table

Document = Mapping[str, Any]


def streaming(document: Document) -> str:
    """Reading, computing, and both at once."""
    told = f"{gigabytes(document['bytes'])} of files, tokens of the texts "
    told += f"{' and '.join(map(str, document['tokens']))}, one run each.\n\n"
    return told + table(
        ("way", "seconds", "of the larger of reading and computing", "weights held",
         "resident above the interpreter"),
        (
            (
                name,
                seconds(row["seconds"]),
                f"{document['stream_to_larger'][name]:.2f}"
                if name in document["stream_to_larger"]
                else NONE,
                gigabytes(row.get("weights_bytes")),
                gigabytes(row.get("peak_rss_above_bytes")),
            )
            for name, row in document["rows"].items()
        ),
    )  # fmt: skip


def strips(document: Document) -> str:
    """Time and pixels at one size, bytes held at several."""
    told = (
        f"{document['side']} px, float32, {len(document['seconds']['whole'])} by turns: strips "
        f"take {document['strips_to_whole']:.2f} of the whole decode's time (medians); largest "
        f"difference {document['largest_difference']:.1e} at pixels up to "
        f"{document['largest_pixel']:.1f}.\n\n"
        "Held on a device in float16, counted without one:\n\n"
    )
    return told + table(
        ("side", "besides the weights, foretold", "counted", "weights"),
        (
            (f"{side} px", *(gigabytes(row[name]) for name in ("room", "counted", "weights")))
            for side, row in document["device_bytes"].items()
        ),
    )


def prediction(document: Document) -> str:
    """The extremes for each model and stage; every case folded away."""
    rows = document["rows"]
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["stage"]), []).append(row["error"])
    brief = table(
        ("model", "stage", "cases", "measured to foretold, least", "most"),
        (
            (model, stage, str(len(errors)), share(min(errors)), share(max(errors)))
            for (model, stage), errors in groups.items()
        ),
    )
    every = table(
        ("model", "stage", "case", "foretold", "measured", "difference"),
        (
            (row["model"], row["stage"], row["case"], gigabytes(row["foretold_bytes"]),
             gigabytes(row["measured_bytes"]), share(row["error"]))
            for row in rows
        ),
    )  # fmt: skip
    return f"{brief}\n{folded(f'All {len(rows)} cases', every)}"


def savings(document: Document) -> str:
    """Peaks by size, and what the text's part would save."""
    peaks: Mapping[str, Mapping[str, int]] = document["peak_bytes"]
    names = list(next(iter(peaks.values())))
    text = table(
        ("activations", *(f"{side} px" for side in peaks)),
        ((name, *(gigabytes(each[name]) for each in peaks.values())) for name in names),
    )
    parts = document["text_part_of_multiplications"]
    return text + "\nOf a step's multiplications only the text decides: " + ", ".join(
        f"{part:.2%} ({name})" for name, part in parts.items()
    ) + ".\n"  # fmt: skip


def compare_demo(document: Document) -> str:
    """How far each variant is."""
    count = len(document["pictures"])
    return f"{count} pictures, means over them; “=” is equal bit for bit.\n\n" + table(
        ("variant", "embeds, error", "latents, error", "PSNR", "worst", "SSIM", "most levels",
         "found as asked"),
        (_variant(each) for each in document["variants"]),
    )  # fmt: skip


def _variant(variant: Document) -> Iterator[str]:
    yield variant["name"]
    if variant["failed"]:
        yield from (f"failed: {variant['failed']}", *[NONE] * 6)
        return
    for name in ("embeds", "latents"):
        found = variant[name]
        yield NONE if found is None else "=" if found["equal"] else f"{found['error']:.2g}"
    pictures = variant["pictures"]
    if pictures is None or pictures["equal"]:
        yield from [NONE if pictures is None else "="] * 4
    else:
        yield from (f"{pictures[name]:.1f} dB" for name in ("psnr", "psnr_worst"))
        yield from (f"{pictures['ssim']:.5f}", str(pictures["largest"]))
    following = variant["following"]
    yield f"{following['found']} of {following['asked']}" if following else NONE


def sizes(document: Document) -> str:
    """Counts."""
    wrong = f"{document['wrong_in_diffusers']:,} ({document['wrong_in_diffusers_part']:.2%})"
    return table(
        ("sizes", "wrong in diffusers", "wrong here", "other than diffusers where it is right"),
        [(f"{document['sizes']:,}", wrong, f"{document['wrong_here']:,}",
          f"{document['not_as_diffusers_where_it_is_right']:,}")],
    )  # fmt: skip


def foretold(document: Document) -> str:
    """The smallest budget of each stage, and what is done within what a process may take."""
    least = table(
        ("stage", "px", "budget", "allocated", "reserved", "way"),
        (
            (row["stage"], str(row["side"] or "any"), gigabytes(row["budget_bytes"]),
             *_foretold_peaks(row, "allocated", "reserved"), row["way"])
            for row in document["rows"]
        ),
    )  # fmt: skip
    cards = table(
        ("--vram", "stage", "allocated", "process", "way"),
        (
            (f"{row['vram_bytes'] >> 30} GiB", row["stage"],
             *_foretold_peaks(row, "allocated", "process"), row["way"])
            for row in document["cards"]
        ),
    )  # fmt: skip
    return f"{least}\n\n### What is done within what the process may take, 1024 px\n\n{cards}"


def _foretold_peaks(row: Document, *names: str) -> list[str]:
    return [gigabytes(row["predicted"][f"peak_{name}_bytes"]) for name in names]
