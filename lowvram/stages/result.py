"""What a stage returns: of one task, and of many that share one loaded component."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lowvram.component import Used
from lowvram.errors import LowvramError, MemoryExhaustedError
from lowvram.memory.meter import Meter, StageReport

if TYPE_CHECKING:
    from lowvram.stages.decision import Decision

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Made:
    """What a stage made of one of its tasks; the attributes are those of `StageResult`."""

    paths: list[Path]
    items: list[dict[str, Any]]


Outcome = Made | LowvramError
OnOutcome = Callable[[int, Outcome], None]  # a task's place in the list, and what came of it


def unheard(index: int, outcome: Outcome) -> None:
    """No one is waiting."""


class Outcomes:
    """What has come of each task of a list so far: one that fails does not end the others."""

    def __init__(self, count: int, on_outcome: OnOutcome = unheard) -> None:
        self._known: dict[int, Outcome] = {}
        self._count = count
        self._on_outcome = on_outcome

    def settle(self, index: int, outcome: Outcome) -> None:
        """Note what came of a task, once."""
        if isinstance(outcome, LowvramError):  # its frames would keep tensors alive
            outcome.__traceback__ = outcome.__context__ = outcome.__cause__ = None
        if index not in self._known:
            self._known[index] = outcome
            self._on_outcome(index, outcome)

    def is_open(self, index: int) -> bool:
        """Whether nothing has come of a task yet."""
        return index not in self._known

    def open(self) -> list[int]:
        """The tasks that nothing has come of yet."""
        return [index for index in range(self._count) if self.is_open(index)]

    @contextmanager
    def of(self, index: int) -> Iterator[None]:
        """What goes wrong inside is that task's outcome; but an out-of-memory is everybody's."""
        try:
            yield
        except MemoryExhaustedError:
            raise
        except LowvramError as error:
            self.settle(index, error)

    def in_order(self) -> list[Outcome]:
        """Of every task."""
        return [self._known[index] for index in range(self._count)]


@dataclass(frozen=True)
class StageResults:
    """What a stage made of many tasks.

    Attributes:
        outcomes: of each task in order; an error where it could not be done.
        report: memory and time of all; None where nothing was left to load for.
    """

    outcomes: list[Outcome]
    report: StageReport | None

    def only(self) -> "StageResult":
        """The result of a single task.

        Raises:
            LowvramError: what came of it.
        """
        (outcome,) = self.outcomes
        if isinstance(outcome, LowvramError):
            raise outcome
        assert self.report is not None
        return StageResult(outcome.paths, outcome.items, self.report)


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


def in_batches(items: Iterable[T], size: int) -> Iterator[Sequence[T]]:
    """The items in order, `size` at a time, taken when they are needed."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def sized(items: Iterable[Mapping[str, Any]], size: Iterable[int]) -> list[dict[str, Any]]:
    """The records of pictures with their width and height in px."""
    width, height = size
    return [{**item, "width": width, "height": height} for item in items]


def shared_settings(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of a report: of many tasks those that are alike, and the names of the others."""
    first = each[0]
    alike = {k: v for k, v in first.items() if all(other.get(k) == v for other in each)}
    differing = sorted({name for other in each for name in other} - set(alike))
    return alike | ({"tasks": len(each), "differing": differing} if len(each) > 1 else {})


def report_stage(
    meter: Meter,
    stage: str,
    weights: str,
    dtype: str,
    reasons: list[str],
    used: Used[Any],
    settings: Mapping[str, Any],
    decision: "Decision[Any] | None" = None,
) -> StageReport:
    """The report of a stage whose work is done and whose component is released.

    Args:
        settings: every setting that changed a byte, and the model's name.
        decision: what was allowed and foretold; None where nothing was loaded.
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
        budget_bytes=decision.budget_bytes if decision else None,
        predicted=decision.predicted if decision else None,
        settings=dict(settings),
        notes=notes,
        **meter.peaks(),  # type: ignore[arg-type]
        **meter.over_time(),
    )
