"""Starts the worker and talks to it: one stage at a time, each in a process of its own."""

import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from lowvram import errors
from lowvram.progress import OnProgress, Progress

log = logging.getLogger(__name__)


class StageProcesses:
    """Runs stages in processes that end with them. A context manager; leaving it ends them all."""

    def __init__(self) -> None:
        self._worker: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._start()  # it imports while the caller resolves and downloads
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        assert worker.stdin is not None and worker.stdout is not None
        if error is not None:
            _terminate(worker)
        with suppress(BrokenPipeError):
            worker.stdin.close()
        worker.stdout.close()
        worker.wait()

    def run(self, stage: str, task: Mapping[str, Any], on_progress: OnProgress) -> dict[str, Any]:
        """Carry out one stage and wait for it.

        Returns:
            as `worker.carry_out`.

        Raises:
            LowvramError: what the stage raised.
            StageDiedError: its process ended without an answer, or it met a bug.
        """
        worker = self._start()
        assert worker.stdin is not None and worker.stdout is not None
        with suppress(BrokenPipeError):  # it has died: reading below says so
            worker.stdin.write(json.dumps({"stage": stage, "task": task}) + "\n")
            worker.stdin.flush()
        for line in worker.stdout:
            event = json.loads(line)
            kind = event.pop("event")
            if kind == "progress":
                on_progress(Progress(**event))
            elif kind == "log":
                log.log(event["level"], "%s", event["message"])
            elif kind == "done":
                return dict(event)
            elif kind == "error":
                raise _error(stage, event)
            elif kind == "died":
                raise _died(stage, event["status"])
        raise _died(stage, worker.wait())

    def _start(self) -> "subprocess.Popen[str]":
        """The worker; a new one where the last has ended with its task."""
        if self._worker is not None and self._worker.poll() is None:
            return self._worker
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "lowvram.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        return self._worker


def _terminate(worker: "subprocess.Popen[str]") -> None:
    """End the worker and the stage it has forked."""
    import psutil

    try:
        children = psutil.Process(worker.pid).children(recursive=True)
    except psutil.Error:
        children = []
    for child in children:
        with suppress(psutil.Error):
            child.kill()
    worker.kill()


def _error(stage: str, event: Mapping[str, Any]) -> errors.LowvramError:
    kind = getattr(errors, event["kind"], None) if event["kind"] else None
    if kind is not None:
        return kind(event["message"])
    log.error("%s", event["text"])
    return errors.StageDiedError(f"{stage} met a bug ({event['message'][:200]}): please report it")


def _died(stage: str, status: int) -> errors.LowvramError:
    if status == -9:
        return errors.MemoryExhaustedError(
            f"{stage} was killed by the system, which was most likely out of memory: "
            "close other programs, or use smaller weights (--weights 4bit) or a smaller --size"
        )
    return errors.StageDiedError(
        f"{stage} ended without an answer (status {status}): run the stage alone to see more"
    )
