"""The micro benchmarks as tables."""

from collections.abc import Mapping
from typing import Any

from benchmarks.page.tables import gigabytes, rate, seconds, share, table


def reader(document: Mapping[str, Any]) -> str:
    """Bytes a second of each way to read."""
    told = f"A file of {gigabytes(document['bytes'])}, medians of {document['repeats']}.\n\n"
    return told + table(
        ("reader", "bandwidth", "of dd's"),
        (
            (name, rate(row["bytes_per_second"]), f"{row['to_dd']:.2f}")
            for name, row in document["rows"].items()
        ),
    )


def artifacts(document: Mapping[str, Any]) -> str:
    """Bytes a second of each file and each thing done with it."""
    ways = ("write", "plain_write", "verify", "read")
    return table(
        ("file", "size", "write", "the bytes alone", "verify", "verify and read"),
        (
            (name, gigabytes(row["bytes"]), *(rate(row[f"{way}_bytes_per_second"]) for way in ways))
            for name, row in document["rows"].items()
        ),
    )


def startup(document: Mapping[str, Any]) -> str:
    """Seconds of each command."""
    return table(
        ("what", "median", "least", "runs"),
        (
            (name, seconds(row["median_seconds"]), seconds(min(row["seconds"])),
             str(len(row["seconds"])))
            for name, row in document["rows"].items()
        ),
    )  # fmt: skip


def meter(document: Mapping[str, Any]) -> str:
    """Overhead by the kind of work."""
    look = f"A look takes {document['look_microseconds']:.0f} µs when it has just been done.\n\n"
    return look + table(
        ("work", "processor time of the thread", "median", "quartiles", "pairs"),
        (
            (
                name,
                share(row["thread_share"]),
                share(row["overhead"]["median"]),
                f"{share(row['overhead']['lower'])} to {share(row['overhead']['upper'])}",
                str(row["pairs"]),
            )
            for name, row in document["work"].items()
        ),
    )
