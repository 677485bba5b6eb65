"""Rows of tasks on their course through the stages: each stage is begun once for all of them.

What goes wrong with one row is that row's error; the others go on. After an out-of-memory a stage
is begun again for the rows that are left, by a way of working that takes less.
"""

import itertools
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from lowvram.errors import LowvramError, MemoryExhaustedError, NothingSmallerError
from lowvram.progress import OnProgress
from lowvram.request.tasks import AnyTask, Tasks, to_json
from lowvram.stages.dispatch import STAGES, OnTold, error_of

Carry = Callable[
    [str, Sequence[Mapping[str, Any]], OnProgress, OnTold], dict[str, Any]
]  # `dispatch.carry_out`, here or in a process of its own

# Whose file a stage goes on from.
_BEFORE = {"denoise": "encode", "decode": "denoise"}

log = logging.getLogger(__name__)


@dataclass
class Trip:
    """The tasks of one row, and what has come of them.

    Attributes:
        tasks: of its stages.
        made: by each stage so far: {"paths", "items"}.
        error: what ended it; None while it goes on, and when it has arrived.
    """

    tasks: Tasks
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: LowvramError | None = None

    def waits_for(self, stage: str) -> bool:
        """Whether a stage is still to be done for it."""
        return self.error is None and stage in self.tasks.by_stage() and stage not in self.made

    def hear(self, stage: str, outcome: Mapping[str, Any]) -> None:
        """Note what a stage made of its task."""
        error = error_of(outcome)
        if error is None:
            self.made[stage] = dict(outcome)
        else:
            self.fail(stage, error)

    def fail(self, stage: str, error: LowvramError) -> None:
        """Note what went wrong, and how to go on from what is there."""
        kept = self.made.get(_BEFORE.get(stage, ""))
        if kept is not None:
            path, start = kept["paths"][0], self.tasks.denoise.start
            again = ["lowvram", stage, path]
            if stage == "denoise" and start:
                again += ["--start", start]
            error = type(error)(
                f"{error} (kept: {path}; go on from it with {shlex.join(again)} "
                "and the options of that stage)"
            )
        self.error = error


def carry_through(
    trips: Sequence[Trip], carry: Carry, on_progress: OnProgress
) -> tuple[list[dict[str, Any]], LowvramError | None]:
    """Take every trip as far as it goes.

    Returns:
        the report of each stage; and the last error, if any, that ended all trips of a stage at
        once and not one alone.
    """
    refuse(trips, carry, on_progress)
    reports: list[dict[str, Any]] = []
    common: LowvramError | None = None
    for stage in STAGES:
        try:
            report = carry_stage(stage, trips, carry, on_progress)
            reports += [] if report is None else [report]
        except LowvramError as error:
            common = error
            for trip in _left(trips, stage):
                trip.fail(stage, error)
    return reports, common


def carry_stage(
    stage: str, trips: Sequence[Trip], carry: Carry, on_progress: OnProgress
) -> dict[str, Any] | None:
    """The report of a stage; by a way of working that takes less after each out-of-memory.

    Where there is none that takes less, the largest pictures are given up, and the others go on.

    Returns:
        None where there was nothing to be done.

    Raises:
        LowvramError: what ended all trips that are left.
    """
    first: MemoryExhaustedError | None = None
    steps_down = 0
    while left := _left(trips, stage):
        tasks = [
            {**to_json(trip.tasks.by_stage()[stage]), "steps_down": steps_down} for trip in left
        ]
        try:
            told = carry(stage, tasks, on_progress, _teller(stage, left))
            return cast("dict[str, Any] | None", told["report"])
        except NothingSmallerError:
            assert first is not None  # it says that something has run out before
            largest = max(map(_pixels, left))
            if all(_pixels(trip) == largest for trip in left):
                raise first from None
            for trip in left:
                if _pixels(trip) == largest:
                    trip.fail(stage, first)
            first, steps_down = None, 0
        except MemoryExhaustedError as error:
            first = first or error
            steps_down += 1
            log.warning("%s: trying what takes less", error)
    return None


def carry_one(
    stage: str,
    task: AnyTask,
    carry: Carry,
    on_progress: OnProgress,
    before: MemoryExhaustedError | None = None,
) -> dict[str, Any]:
    """Carry out one task; after an out-of-memory by a way of working that takes less.

    Args:
        before: the out-of-memory of the first way, where that has been tried already.

    Returns:
        "paths", "items" and "report".

    Raises:
        LowvramError: as the stage does.
    """
    first = before
    for steps_down in itertools.count(0 if before is None else 1):
        outcome: dict[str, Any] = {}
        tasks = [{**to_json(task), "steps_down": steps_down}]

        def hear(index: int, told: Mapping[str, Any], to: dict[str, Any] = outcome) -> None:
            to.update(told)

        try:
            made = {**carry(stage, tasks, on_progress, hear), **outcome}
        except NothingSmallerError:
            assert first is not None  # it says that something has run out before
            raise first from None
        except MemoryExhaustedError as error:
            first = first or error
            log.warning("%s: trying what takes less", error)
            continue
        wrong = error_of(outcome)
        if wrong is not None:
            raise wrong
        return made
    raise AssertionError("unreachable")


def refuse(trips: Sequence[Trip], carry: Carry, on_progress: OnProgress) -> None:
    """End trips that can be known not to arrive, before anything is loaded."""

    def look(stage: str, asked: Sequence[Trip], tasks: Sequence[Mapping[str, Any]]) -> None:
        if asked:
            carry(stage, tasks, on_progress, lambda i, outcome: asked[i].hear(stage, outcome))

    asks = [trip for trip in trips if trip.error is None and trip.tasks.denoise.asks_the_scheduler]
    look("check", asks, [to_json(trip.tasks.denoise) for trip in asks])
    bound = [
        trip
        for trip in trips
        if trip.error is None and (trip.tasks.encode.vram or trip.tasks.encode.stage_budget)
    ]
    rows = [{name: to_json(task) for name, task in trip.tasks.by_stage().items()} for trip in bound]
    look("plan", bound, rows)


def _teller(stage: str, trips: Sequence[Trip]) -> OnTold:
    return lambda index, outcome: trips[index].hear(stage, outcome)


def _left(trips: Sequence[Trip], stage: str) -> list[Trip]:
    """Those that nothing has come of yet in a stage."""
    return [trip for trip in trips if trip.waits_for(stage)]


def _pixels(trip: Trip) -> int:
    """Of a picture, as it is computed."""
    width, height = trip.tasks.denoise.rendered
    return width * height
