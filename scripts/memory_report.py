#!/usr/bin/env python3
"""Memory and time of each stage: `scripts/memory_report.py outputs/a-red-heart.report.json`.

Given a report's file, prints its table again. Given a prompt and settings, as `lowvram run` takes
them, runs and reports: `scripts/memory_report.py "a red heart" -m demo --encoder-weights 4bit`.
Sets up its own environment first.
"""

import sys

from _environment import become, executable, prepare

if __name__ == "__main__":
    prepare()
    arguments = sys.argv[1:] or ["--help"]
    command = "report" if any(each.endswith(".json") for each in arguments) else "run"
    become([executable("lowvram"), command, *arguments])
