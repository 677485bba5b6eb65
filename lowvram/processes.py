"""Starts the worker and talks to it: one stage at a time, each in a process of its own."""

import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from lowvram import errors
from lowvram.progress import OnProgress, Progress
from lowvram.read_ahead import ReadAhead, read_for

if TYPE_CHECKING:
    from lowvram.stages.dispatch import OnTold

log = logging.getLogger(__name__)

_START = "import sys; sys.path.append(sys.argv[1]); from lowvram.worker import main; main()"


class StageProcesses:
    """Runs stages in processes that end with them. A context manager; leaving it ends them all."""

    def __init__(self, fork: bool = True) -> None:
        """`fork=False` gives each stage a worker of its own also where one could serve all."""
        self._fork = fork
        self._worker: subprocess.Popen[str] | None = None
        self._warned: set[str] = set()
        self._read_bytes: dict[str, int] = {}  # ahead, by stage, and in no report yet

    def __enter__(self) -> Self:
        self._start()  # it imports while the caller resolves and downloads
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._worker is not None:
            _terminate(self._worker)
        self._leave()

    def run(
        self,
        stage: str,
        tasks: Sequence[Mapping[str, Any]],
        on_progress: OnProgress,
        on_outcome: "OnTold",
    ) -> dict[str, Any]:
        """Carry out one stage and wait for it.

        Args and returns: as `stages.dispatch.carry_out`.

        Raises:
            LowvramError: what the stage raised.
            StageDiedError: its process ended without an answer, or it met a bug.
        """
        with ReadAhead(stage, tasks) as ahead:
            worker = self._start()
            assert worker.stdin is not None and worker.stdout is not None
            with suppress(OSError):  # it has died: reading below says so
                worker.stdin.write(json.dumps({"stage": stage, "tasks": list(tasks)}) + "\n")
                worker.stdin.flush()
            for line in worker.stdout:
                event = json.loads(line)
                kind = event.pop("event")
                if event.pop("last", False):
                    self._leave()
                if kind == "progress":
                    ahead.stop()
                    on_progress(Progress(**event))
                elif kind == "outcome":
                    on_outcome(event["index"], event["outcome"])
                elif kind == "log":
                    self._log(event["level"], event["message"])
                elif kind == "done":
                    reader = read_for(stage, tasks)
                    self._read_bytes[reader] = self._read_bytes.get(reader, 0) + ahead.ended()
                    return self._with_reads(stage, event)
                elif kind == "error":
                    raise _error(stage, event)
                elif kind == "died":
                    raise _died(stage, event["status"])
        status = worker.wait()
        self._leave()
        raise _died(stage, status)

    def _start(self) -> "subprocess.Popen[str]":
        """The worker; a new one where the last has ended with its task."""
        if self._worker is not None and self._worker.poll() is None:
            return self._worker
        # -P, because with -m the current folder comes first, and a torch.py there would be run;
        # this package may itself be run from a folder, so that one is added at the end.
        command = [sys.executable, "-P", "-c", _START, str(Path(__file__).parents[1])]
        with _interrupts_ignored():
            self._worker = subprocess.Popen(
                command if self._fork else [*command, "--no-fork"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL if sys.stderr is None else None,
                encoding="utf-8",
            )
        return self._worker

    def _with_reads(self, stage: str, told: Mapping[str, Any]) -> dict[str, Any]:
        """What a stage answered, with the bytes that were read for it, though not by it."""
        report = told.get("report")
        if report and report.get("disk_read_bytes") is not None:
            report["disk_read_bytes"] += self._read_bytes.pop(stage, 0)
        return dict(told)

    def _log(self, level: int, message: str) -> None:
        """Pass it on; a warning that every stage has only once."""
        if level >= logging.WARNING:
            if message in self._warned:
                return
            self._warned.add(message)
        log.log(level, "%s", message)

    def _leave(self) -> None:
        """Wait for the worker's end."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        assert worker.stdin is not None and worker.stdout is not None
        with suppress(OSError):
            worker.stdin.close()
        worker.stdout.close()
        worker.wait()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process that starts meanwhile ignores Ctrl-C from its first moment: we end it ourselves.

    One that reaches us in these milliseconds is lost, and has to be typed again.
    """
    if threading.current_thread() is not threading.main_thread():  # only there it can be set
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
    """The error of a stage that ended so.

    Raises:
        KeyboardInterrupt: by Ctrl-C, which reaches the stage and us, and can be lost here.
    """
    if status in (errors.INTERRUPTED_EXIT_CODE, -signal.SIGINT):
        raise KeyboardInterrupt
    if status == -9:
        return errors.MemoryExhaustedError(
            f"{stage} was killed by the system, which was most likely out of memory: "
            f"{errors.less_memory(stage)}"
        )
    return errors.StageDiedError(
        f"{stage} ended without an answer (status {status}): run the stage alone to see more"
    )
