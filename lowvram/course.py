"""Rows of tasks on their course through the stages: each stage is begun once for all of them.

What goes wrong with one row is that row's error; the others go on. After an out-of-memory a stage
is begun again for the rows that are left, by a way of working that takes less.
"""

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from lowvram.errors import LowvramError, MemoryExhaustedError, NothingSmallerError
from lowvram.progress import OnProgress
from lowvram.request.denoise import DenoiseTask
from lowvram.request.run import Tasks
from lowvram.request.tasks import to_json
from lowvram.stages.dispatch import STAGES, OnTold, error_of

Carry = Callable[
    [str, Sequence[Mapping[str, Any]], OnProgress, OnTold], dict[str, Any]
]  # `dispatch.carry_out`, here or in a process of its own

log = logging.getLogger(__name__)


@dataclass
class Trip:
    """The tasks of one row, and what has come of them.

    Attributes:
        tasks: of each stage, in order.
        made: by each stage so far: {"paths", "items"}.
        error: what ended it; None while it goes on, and when it has arrived.
    """

    tasks: Tasks
    made: list[dict[str, Any]] = field(default_factory=list)
    error: LowvramError | None = None

    def hear(self, stage: str, outcome: Mapping[str, Any]) -> None:
        """Note what a stage made of its task."""
        error = error_of(outcome)
        if error is None:
            self.made.append(dict(outcome))
        else:
            self.fail(stage, error)

    def fail(self, stage: str, error: LowvramError) -> None:
        """Note what went wrong, and how to go on from what is there."""
        if self.made:
            kept = self.made[-1]["paths"][0]
            again = shlex.join(["lowvram", stage, kept])
            error = type(error)(
                f"{error} (kept: {kept}; go on from it with {again} and the options of that stage)"
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
    _refuse(trips, carry, on_progress)
    reports: list[dict[str, Any]] = []
    common: LowvramError | None = None
    for number, stage in enumerate(STAGES):
        open_trips = [trip for trip in trips if trip.error is None]
        if not open_trips:
            break
        try:
            report = _carry_stage(number, open_trips, carry, on_progress)
            reports += [] if report is None else [report]
        except LowvramError as error:
            common = error
            for trip in _left(open_trips, number):
                trip.fail(stage, error)
    return reports, common


def _refuse(trips: Sequence[Trip], carry: Carry, on_progress: OnProgress) -> None:
    """End trips that can be known not to arrive, before anything is loaded."""

    def look(stage: str, asked: Sequence[Trip], tasks: Sequence[Mapping[str, Any]]) -> None:
        if asked:
            carry(stage, tasks, on_progress, lambda i, outcome: asked[i].hear(stage, outcome))

    asks = [trip for trip in trips if trip.error is None and _denoise(trip).asks_the_scheduler]
    look("check", asks, [to_json(_denoise(trip)) for trip in asks])
    bound = [
        trip
        for trip in trips
        if trip.error is None and (trip.tasks[0].vram or trip.tasks[0].stage_budget)
    ]
    rows = [
        dict(zip(STAGES, (to_json(task) for task in trip.tasks), strict=True)) for trip in bound
    ]
    look("plan", bound, rows)


def _carry_stage(
    number: int, trips: Sequence[Trip], carry: Carry, on_progress: OnProgress
) -> dict[str, Any] | None:
    """The report of a stage; by a way of working that takes less after each out-of-memory.

    Where there is none that takes less, the largest pictures are given up, and the others go on.

    Raises:
        LowvramError: what ended all trips that are left.
    """
    stage = STAGES[number]
    first: MemoryExhaustedError | None = None
    steps_down = 0
    while left := _left(trips, number):
        tasks = [{**to_json(trip.tasks[number]), "steps_down": steps_down} for trip in left]
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


def _teller(stage: str, trips: Sequence[Trip]) -> OnTold:
    return lambda index, outcome: trips[index].hear(stage, outcome)


def _left(trips: Sequence[Trip], number: int) -> list[Trip]:
    """Those that nothing has come of yet in a stage."""
    return [trip for trip in trips if trip.error is None and len(trip.made) == number]


def _denoise(trip: Trip) -> DenoiseTask:
    return trip.tasks[1]


def _pixels(trip: Trip) -> int:
    """Of a picture, as it is computed."""
    width, height = _denoise(trip).rendered
    return width * height
