"""The process that stages run in, started by `processes.StageProcesses`.

Reads lists of tasks as JSON lines on stdin, writes events as JSON lines on what was its stdout
(anything else that prints there goes to stderr). On Linux it imports the libraries once and forks a
child for each list: every stage has a process of its own that ends with it, and only the first
one pays for the imports. Elsewhere, and wherever importing has touched the GPU, it carries out
one list and ends.
"""

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import IO, Any

from lowvram.errors import INTERRUPTED_EXIT_CODE, LowvramError
from lowvram.stages.dispatch import COMPONENTS, STAGES, carry_out
from lowvram.terminal import quiet_libraries


class _EventHandler(logging.Handler):
    """Sends log records to the process that started this one."""

    def __init__(self, events: IO[str]) -> None:
        super().__init__(logging.INFO)
        self.events = events

    def emit(self, record: logging.LogRecord) -> None:
        _send(self.events, "log", level=record.levelno, message=record.getMessage())


_DRIVER_DEVICES = ("/dev/nvidia-uvm", "/dev/dxg")  # of the CUDA driver; the second under WSL2


def main() -> None:
    """Serve lists of tasks until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the stage, and for who started us
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.getLogger("lowvram").addHandler(_EventHandler(events))
    logging.getLogger("lowvram").setLevel(logging.INFO)
    forks = _preload() and sys.platform == "linux" and "--no-fork" not in sys.argv
    for line in sys.stdin:
        request = json.loads(line)
        if not forks:
            _serve(request, events, last=True)
            return
        child = os.fork()
        if child == 0:
            _serve(request, events, last=False)
            os._exit(0)
        _import_ahead(request["stage"], request["tasks"])
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            _send(events, "died", status=status)


def _preload() -> bool:
    """Import what every stage needs.

    Returns:
        whether the process may be forked: not once a GPU has been touched.
    """
    # Torch then asks the driver's monitor for GPUs, where counting them would start the driver.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    quiet_libraries()
    import transformers.modeling_utils  # noqa: F401 - diffusers imports it too

    if torch.version.cuda is None and not torch.accelerator.is_available():
        # Importing diffusers' models imports bitsandbytes, which touches a GPU where there is one.
        import diffusers.models.modeling_utils  # noqa: F401

        return True
    return torch.version.cuda is not None and not _driver_started()


def _import_ahead(stage: str, tasks: Sequence[Mapping[str, Any]]) -> None:
    """While a stage works, or all are planned: import the networks of later ones, for their forks.

    Not where torch is built for CUDA: importing networks starts the driver, if there is one.
    """
    import torch

    if torch.version.cuda is not None or stage not in (*STAGES, "plan"):
        return
    with suppress(Exception):  # the stage that needs it says so better
        from lowvram.repository import Model
        from lowvram.weights.checkpoint import find_class

        task = next(iter(tasks[0].values())) if stage == "plan" else tasks[0]
        family = Model.from_record(task["model"]).get_family()
        for later in STAGES if stage == "plan" else STAGES[STAGES.index(stage) + 1 :]:
            for role in COMPONENTS[later]:
                find_class(family.component(role).class_name)


def _driver_started() -> bool:
    """Whether the CUDA driver is up: a child forked from then on cannot use it. Torch knows only of
    what it has started itself; a library that counts devices starts the driver too, and that opens
    its device for memory.
    """
    import torch

    if torch.cuda.is_initialized():
        return True
    with suppress(OSError):  # not Linux, where nothing is forked
        for descriptor in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # that of the listing itself
                if os.readlink(f"/proc/self/fd/{descriptor}").startswith(_DRIVER_DEVICES):
                    return True
    return False


def _serve(request: dict[str, Any], events: IO[str], last: bool) -> None:
    """Carry out one stage and say how it ended, and whether this process takes no further one."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        result = carry_out(
            request["stage"],
            request["tasks"],
            lambda progress: _send(events, "progress", **asdict(progress)),
            lambda index, outcome: _send(events, "outcome", index=index, outcome=outcome),
        )
        _send(events, "done", last=last, **result)
    except LowvramError as error:
        _send(events, "error", last=last, kind=type(error).__name__, message=str(error))
    except KeyboardInterrupt:
        os._exit(INTERRUPTED_EXIT_CODE)
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        message = f"{type(error).__name__}: {error}"
        _send(events, "error", last=last, kind="", message=message, text=text)


def _send(events: IO[str], event: str, **fields: object) -> None:
    try:
        events.write(json.dumps({"event": event, **fields}) + "\n")
        events.flush()
    except OSError:  # the process that asked is gone: nothing here is wanted any more
        os._exit(128 + getattr(signal, "SIGPIPE", 13))
