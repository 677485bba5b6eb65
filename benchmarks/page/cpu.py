"""cpu.json as tables: contenders end to end, and the stages one by one."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.page.tables import NONE, gigabytes, seconds, table

Row = Mapping[str, Any]
_TITLES = {
    "demo": "The demo model, 128 px, 20 steps",
    "true": "True sizes with random weights, 512 px, 2 steps, files in bf16 read cold",
    "tiny": "Tiny networks: that the harness works, and nothing about speed",
}


def body(document: Mapping[str, Any]) -> str:
    """A table for each part and kind that was measured."""
    rows: Mapping[str, Row] = document["rows"]
    parts = [
        "“Resident” is the peak of the largest process, “anonymous” what of it no file stands "
        "behind, seen from outside; the seconds are of the whole command, with imports. "
        "Distances are from the fp32 one-shot pipeline's pictures.\n"
    ]
    for part, title in _TITLES.items():
        ends = {key: row for key, row in rows.items() if row["part"] == part}
        whole = {key: row for key, row in ends.items() if row["kind"] != "stage"}
        stages = {key: row for key, row in ends.items() if row["kind"] == "stage"}
        parts += [f"### {title}\n"] if ends else []
        parts += [_contenders(whole)] if whole else []
        parts += [_stages(stages)] if stages else []
    return "\n".join(parts)


def peak(row: Row, name: str = "peak_rss_bytes") -> int | None:
    """The largest of a row's stages, in bytes."""
    return max((each[name] for each in row.get("stages") or [] if each.get(name)), default=None)


def _contenders(rows: Mapping[str, Row]) -> str:
    return table(
        ("contender", "prompts", "seconds", "first picture", "resident", "anonymous", "read",
         "most levels", "mean levels", "PSNR"),
        (_contender(key, row) for key, row in rows.items()),
    )  # fmt: skip


def _contender(key: str, row: Row) -> Iterator[str]:
    yield row["name"] + _ways(row)
    yield NONE if row["kind"] == "interpreter" else key.rsplit("/n", 1)[1]
    if not row["ok"]:
        yield from (f"{row['error']}", *[NONE] * 7)
        return
    yield seconds(row["wall_seconds"])
    yield seconds(row.get("seconds_to_first_picture"))
    yield gigabytes(peak(row))
    yield gigabytes((row["peaks_seen"] or {}).get("anonymous"))
    yield gigabytes(row["read_bytes"])
    found = row.get("distance")
    if not found:
        yield from [NONE] * 3
        return
    psnr = "equal" if found["psnr"] is None else f"{found['psnr']:.1f} dB"
    yield from (str(found["largest"]), f"{found['mean']:.3f}", psnr)


def _ways(row: Row) -> str:
    """How each stage worked, where the product chose it: the first of its reasons."""
    reasons = [stage["reasons"][0] for stage in row.get("stages") or [] if stage.get("reasons")]
    return f" ({', '.join(reason.partition(':')[0] for reason in reasons)})" if reasons else ""


def _stages(rows: Mapping[str, Row]) -> str:
    return table(
        ("stage", "dtype", "seconds", "load", "compute", "CPU", "weights", "resident", "anonymous",
         "read", "load average"),
        (_stage(row) for row in rows.values()),
    )  # fmt: skip


def _stage(row: Row) -> Iterator[str]:
    again = row.get("not_measured_again")
    yield row["name"] + (f" (older: not measured again on {again['date']})" if again else "")
    if not row["ok"]:
        yield from (f"{row['error']}", *[NONE] * 9)
        return
    stage = row["stages"][0]
    yield stage["dtype"]
    yield seconds(row["wall_seconds"])
    yield from (seconds(stage[name]) for name in ("load_seconds", "compute_seconds"))
    yield seconds(row["cpu_seconds"])
    yield from (gigabytes(stage[name]) for name in ("weights_bytes", "peak_rss_bytes"))
    yield gigabytes((row["peaks_seen"] or {}).get("anonymous"))
    yield gigabytes(row["read_bytes"])
    load = row.get("load_average")
    yield NONE if load is None else f"{load:.1f}"
