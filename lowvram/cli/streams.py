"""Standard streams that are closed, full or no longer read, as services and pipes leave them."""

import os
import re
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import TextIO

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def prepare_streams() -> None:
    """Make all three streams usable, whatever started this program."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: the next file that is opened would get its number
            nowhere = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115
            os.set_inheritable(nowhere.fileno(), True)  # for the stages' processes
            setattr(sys, name, nowhere)
    for stream in (sys.stdout, sys.stderr):  # a path or prompt that this encoding lacks
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(line: str) -> None:
    """One line on stderr, whatever is in it: a path may hold a line break."""
    with suppress(OSError):  # full, or no one reads it: then the exit code has to do
        print(_CONTROL.sub(lambda found: repr(found[0])[1:-1], line), file=sys.stderr)


def give_up(stream: TextIO) -> None:
    """What could not be written goes nowhere; else Python tries again as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
