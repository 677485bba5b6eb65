"""Ctrl-C in the middle of a run, as a terminal sends it: to the whole group of processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from lowvram import errors


def interrupt_denoise(model: Path, picture: Path, *options: str) -> tuple[int, str]:
    """Interrupt `lowvram run` once it denoises; no process of it is alive then.

    Returns:
        how many processes it had started, and what it said after the interrupt.
    """
    command = [sys.executable, "-m", "lowvram", "run", "a cat", "-m", str(model), "--steps", "900"]
    process = subprocess.Popen(
        [*command, "-o", str(picture), *options],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("denoise on"):
            break
    family: Sequence[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == errors.INTERRUPTED_EXIT_CODE
    assert psutil.wait_procs(family, timeout=30)[1] == []
    return len(family), said.strip()
