#!/usr/bin/env python3
"""Memory and time of each stage: `scripts/memory_report.py outputs/a-red-heart.png`.

Given a run's report, picture or folder, shows it again as `lowvram report` does, `--html` and
`--plot` included. Given a prompt and settings as `lowvram run` takes them, runs and reports:
`scripts/memory_report.py "a red heart" -m demo --encoder-weights 4bit`.
Sets up its own environment first.
"""

import os
import sys
from collections.abc import Sequence

from _environment import become, executable, prepare


def command(arguments: Sequence[str]) -> str:
    """The command that these arguments are for."""
    first = next(iter(arguments), "")
    names_a_run = first.endswith((".json", ".png")) or os.path.exists(first)
    asks_for_a_file = any(each.split("=")[0] in ("--html", "--plot") for each in arguments)
    return "report" if names_a_run or asks_for_a_file else "run"


if __name__ == "__main__":
    prepare()
    arguments = sys.argv[1:] or ["--help"]
    become([executable("lowvram"), command(arguments), *arguments])
