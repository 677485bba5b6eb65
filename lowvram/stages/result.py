"""What a stage returns, and how long lists are cut into batches."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lowvram.component import Used
from lowvram.memory.meter import Meter, StageReport

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageResult:
    """What a stage made.

    Attributes:
        paths: the artifact (encode, denoise) or the pictures (decode).
        items: one record per prompt or picture, in order, as in the artifact's header.
        report: memory and time.
    """

    paths: list[Path]
    items: list[dict[str, Any]]
    report: StageReport


def in_batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items in order, `size` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def report_stage(
    meter: Meter,
    stage: str,
    weights: str,
    dtype: str,
    reasons: list[str],
    used: Used[Any],
    settings: Mapping[str, Any],
    *,
    budget_bytes: int | None = None,
    predicted: dict[str, Any] | None = None,
) -> StageReport:
    """The report of a stage whose work is done and whose component is released.

    Args:
        settings: every setting that changed a byte, and the model's name.
        budget_bytes: what the stage was allowed to hold on the device.
        predicted: numbers foretold, by the names of `StageReport`.
    """
    for note in (notes := meter.notes()):
        log.warning("%s: %s", stage, note)
    return StageReport(
        stage=stage,
        device=meter.device.type,
        weights=weights,
        dtype=dtype,
        reasons=reasons,
        seconds=meter.total_seconds(),
        load_seconds=meter.seconds.get("load", 0.0),
        compute_seconds=meter.seconds.get("compute", 0.0),
        weights_bytes=used.weights_bytes,
        left_allocated_bytes=meter.left_allocated(),
        left_behind=used.left_behind,
        left_tensors=used.left_tensors,
        budget_bytes=budget_bytes,
        predicted=predicted,
        settings=dict(settings),
        notes=notes,
        **meter.peaks(),  # type: ignore[arg-type]
        **meter.over_time(),
    )
