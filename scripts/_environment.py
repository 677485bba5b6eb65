"""The virtual environment that everything in scripts/ runs in: `.venv`, made and kept in step.

Standard library only, and the same on Linux, macOS and Windows. Not run by itself:

    from _environment import become, prepare
    become([prepare(), "-m", "pytest"])
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

# Before anything an older Python could stumble over: the reader must see this line, no traceback.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        f"lowvram needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}: "
        "start the script with a newer one."
    )

ROOT = Path(__file__).resolve().parent.parent
_VENV = ROOT / ".venv"
_BIN = _VENV / ("Scripts" if os.name == "nt" else "bin")
_SUFFIX = ".exe" if os.name == "nt" else ""
_STAMP = _VENV / "lowvram-installed"


def prepare() -> str:
    """Return the environment's interpreter, after making or updating the environment if need be.

    Exits with one line, below the output of the command that failed, when that is not possible.
    """
    python = executable("python")
    if _STAMP.is_file() and Path(python).exists() and _STAMP.read_text() == _wanted():
        return python
    if not _has_pip(python):
        _say("making a virtual environment in .venv")
        _run([sys.executable, "-m", "venv", "--clear", str(_VENV)])
    _say("installing the pinned packages into .venv (takes minutes the first time)")
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    _run([*pip, "--constraint", "constraints.txt", "torch", "--editable", ".[dev]"])
    _STAMP.write_text(_wanted())
    return python


def executable(name: str) -> str:
    """Path of a command inside the environment, which may not exist yet."""
    return str(_BIN / (name + _SUFFIX))


def become(command: list[str]) -> NoReturn:
    """Replace this process by `command`: its output, its signals, its exit code."""
    if os.name == "nt":  # exec there returns to the shell at once, before the command has ended
        sys.exit(subprocess.run(command).returncode)
    os.execv(command[0], command)


def _wanted() -> str:
    """Hash of all that decides what is installed: what is asked for, by which Python, for where."""
    parts = [
        (ROOT / "pyproject.toml").read_bytes(),
        (ROOT / "constraints.txt").read_bytes(),
        (_VENV / "pyvenv.cfg").read_bytes(),  # holds the Python version
        os.path.realpath(executable("python")).encode(),  # changes when the system upgrades Python
        str(ROOT).encode(),  # an editable install points at the folder it was made in
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _has_pip(python: str) -> bool:
    """False also when there is no environment, or it belonged to a Python that is gone."""
    try:
        done = subprocess.run([python, "-m", "pip", "--version"], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def _run(command: list[str]) -> None:
    """Run in the repository, silently unless it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except KeyboardInterrupt:
        _say("stopped; start again to go on")
        sys.exit(130)
    if done.returncode != 0:
        sys.stderr.write(done.stdout.decode(errors="replace"))
        sys.exit("lowvram: failed (output above): " + " ".join(command))


def _say(line: str) -> None:
    print("lowvram: " + line, file=sys.stderr, flush=True)
