"""How a comparison has its stages carried out: as `run` does, here or each in a process of its own.

The only file of this package that knows the worker and `run`'s way down after an out-of-memory.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from lowvram.course import Carry, carry_one
from lowvram.processes import StageProcesses
from lowvram.progress import OnProgress, ignore
from lowvram.request.denoise import DenoiseTask
from lowvram.request.tasks import AnyTask, to_json
from lowvram.stages.dispatch import carry_out, error_of


class Carrier:
    """Carries out stages and measurements. A context manager; leaving it ends its processes."""

    def __init__(self, in_process: bool) -> None:
        self._stack = ExitStack()
        self._carry: Carry = carry_out
        if not in_process:
            self._carry = self._stack.enter_context(StageProcesses()).run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def check(self, task: DenoiseTask) -> None:
        """Find out before anything is loaded whether the model's scheduler can do the task.

        Raises:
            LowvramError: as `stages.denoise.check_each`.
        """
        if task.asks_the_scheduler:
            self._one("check", to_json(task), ignore)

    def stage(self, stage: str, task: AnyTask, on_progress: OnProgress) -> Mapping[str, Any]:
        """Carry out one stage; after an out-of-memory by a way that takes less, as `run` does.

        Returns:
            "paths", "items" and "report".

        Raises:
            LowvramError: as the stage does.
        """
        return carry_one(stage, task, self._carry, on_progress)

    def measure(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `differences.measure`."""
        found: Mapping[str, Any] = self._one("measure", task, ignore)["report"]
        return found

    def _one(self, stage: str, task: Mapping[str, Any], on_progress: OnProgress) -> dict[str, Any]:
        """What came of one task, with the stage's report."""
        outcome: dict[str, Any] = {}
        told = self._carry(stage, [task], on_progress, lambda _, each: outcome.update(each))
        error = error_of(outcome)
        if error is not None:
            raise error
        return {**outcome, **told}
