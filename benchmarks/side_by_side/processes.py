"""Commands of the benchmark in processes of their own; and the page cache around them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.watched import ROOT, evict, first_on_path, how_it_ended

_READ_BYTES = 1 << 24


@dataclass(frozen=True)
class Ended:
    """How a command ended; None where it went well, else "exit code 1: its last line"."""

    error: str | None


def lines_of(
    command: Sequence[str], timeout: float, environment: Mapping[str, str], given: str = ""
) -> Iterator[str | Ended]:
    """The lines that a command prints, as they come, and then how it ended.

    The command leads a process group, which ends with it: nothing of a row that was stopped runs on
    into the next.

    Args:
        timeout: seconds.
        environment: beside that of this process.
        given: to its stdin.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            env={**os.environ, **first_on_path(), **environment},
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        alarm = _Alarm(process, timeout)
        try:
            with suppress(OSError), process.stdin as stdin:  # it may have died at once
                stdin.write(given)
            with process.stdout as stdout:
                yield from stdout
            process.wait()
        finally:
            alarm.cancel()
            end(process)
        errors.seek(0)
        said = [line.strip() for line in errors.read().splitlines() if line.strip()]
    yield Ended(how_it_ended(process.returncode, alarm.rang, timeout, said))


def json_of(
    command: Sequence[str], timeout: float, environment: Mapping[str, str]
) -> tuple[dict[str, Any] | None, str | None]:
    """The one JSON document that a command prints, None if it did not; and what went wrong."""
    *lines, ended = lines_of(command, timeout, environment)
    assert isinstance(ended, Ended)
    try:
        document: dict[str, Any] = json.loads("".join(str(line) for line in lines))
    except ValueError:
        return None, ended.error or "no JSON on stdout"
    return (None if ended.error else document), ended.error


def end(process: "subprocess.Popen[str]") -> None:
    """End a process and its whole group, if it has not ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class _Alarm:
    """Ends a process that takes too long."""

    def __init__(self, process: "subprocess.Popen[str]", seconds: float) -> None:
        self.rang = False

        def ring() -> None:
            self.rang = True
            end(process)

        self._timer = threading.Timer(seconds, ring)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        self._timer.cancel()


def python(module: str, *arguments: str) -> list[str]:
    """A module of this checkout as a command."""
    return [sys.executable, "-m", module, *arguments]


def make_cold(folders: Iterable[Path]) -> None:
    """Put the weights in some folders out of the page cache."""
    for folder in folders:
        evict(folder)


def make_warm(folders: Iterable[Path]) -> None:
    """Read the weights in some folders into the page cache."""
    files = [path for folder in folders for path in folder.rglob("*.safetensors")]
    sizes = [(path, at) for path in files for at in range(0, path.stat().st_size, 1 << 30)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda part: _read(*part), sizes))


def _read(path: Path, start: int) -> None:
    buffer = bytearray(_READ_BYTES)
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while start < file.tell() + 1 <= start + (1 << 30) and file.readinto(buffer):
            pass
