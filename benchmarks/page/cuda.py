"""cuda.json as tables: foretold against held, strips, streaming, and how far results are apart."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.page.tables import NONE, gigabytes, noted, share, table

Row = Mapping[str, Any]
_ROLES = {"text_encoder": "T5-XXL", "transformer": "transformer", "vae": "VAE decode, whole"}


def body(document: Mapping[str, Any]) -> str:
    """A table for each kind of measurement."""
    return "\n".join(
        [
            noted(document),
            "### Networks of true size with random weights, one pass\n",
            _foretold(list(_of(document, "foretold"))),
            "### The VAE in strips, against the whole decode\n",
            _strips(list(_of(document, "strips"))),
            "### A step of eight blocks with guidance: weights on the card, and streamed to it\n",
            _overlap(list(_of(document, "overlap"))),
            "### Results\n",
            _apart(document),
        ]
    )


def strips_peak(document: Mapping[str, Any], size: int) -> int | None:
    """The least bytes in which strips decoded half precision at that size, px."""
    rows = (row for row in _of(document, "strips") if row["dtype"] == "torch.float16")
    return min((row["allocated"] for row in rows if 8 * row["side"] == size), default=None)


def _of(document: Mapping[str, Any], test: str) -> Iterator[Row]:
    return (row for row in document.get("rows") or () if row["test"] == test)


def _foretold(rows: list[Row]) -> str:
    titles = ("network", "of", "dtype", "held", "foretold in this run", "held to that",
              "foretold since", "held to that", "reserved")  # fmt: skip
    lines = []
    for row in rows:
        side, _, ways = row["size"].partition(" ")
        of = f"{side} tokens" if row["role"] == "text_encoder" else f"{8 * int(side)} px"
        line = [_ROLES[row["role"]], ", ".join(filter(None, (of, ways))), _dtype(row)]
        line.append(gigabytes(row["allocated"]))
        for name in ("predicted_allocated", "predicted_since"):
            line += _beside(row.get(name), row["allocated"])
        lines.append([*line, gigabytes(row["reserved"])])
    return table(titles, lines)


def _strips(rows: list[Row]) -> str:
    titles = ("px", "dtype", "budget", "reserved", "held", "foretold in this run", "held to that",
              "foretold since", "held to that", "largest error")  # fmt: skip
    return table(
        titles,
        (
            [
                str(8 * row["side"]),
                _dtype(row),
                *(gigabytes(row[name]) for name in ("budget", "reserved", "allocated")),
                *_beside(row["predicted"], row["allocated"]),
                *_beside(row.get("predicted_since"), row["allocated"]),
                f"{row['error']:.1e}",
            ]
            for row in rows
        ),
    )


def _overlap(rows: list[Row]) -> str:
    resident = {row["side"]: row["seconds"] for row in rows if row.get("way") == "resident"}
    lines = [
        [
            f"{8 * row['side']}",
            f"{1e3 * resident[row['side']]:.2f} ms",
            f"{1e3 * row['seconds']:.2f} ms",
            f"{row['seconds'] / resident[row['side']]:.3f}",
        ]
        for row in rows
        if row.get("way") == "stream" and row["side"] in resident
    ]
    copies = "".join(
        f"\nThe copies alone ({gigabytes(row['bytes'])} a step): {1e3 * row['copies']:.2f} ms.\n"
        for row in rows
        if "copies" in row
    )
    return table(("px", "on the card", "streamed", "ratio"), lines) + copies


def _apart(document: Mapping[str, Any]) -> str:
    lines = [
        [f"T5 in {row['bits']} bits, embeddings of tokens against whole", "cosine",
         f"{row['least']:.5f}", f"{row['mean']:.5f}"]
        for row in _of(document, "cosine")
    ]  # fmt: skip
    lines += [
        [f"picture of the {row['model']} model in float32, against the CPU's", "levels of 255",
         str(row["most"]), f"{row['mean']:.5f}"]
        for row in _of(document, "picture")
    ]  # fmt: skip
    return table(("what", "in", "worst", "mean"), lines)


def _beside(foretold: float | None, held: float) -> list[str]:
    return [gigabytes(foretold), share(held / foretold - 1)] if foretold else [NONE, NONE]


def _dtype(row: Row) -> str:
    return str(row["dtype"]).removeprefix("torch.")
