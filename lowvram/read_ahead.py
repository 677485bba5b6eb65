"""Reads a stage's weights into the page cache while its libraries are imported.

The disk has nothing to do meanwhile: `run` with T5-XXL from a cold disk took 0.6 to 0.7 of the time
with it (docs/log.md). It ends with the first that the stage says, and takes no more than a share
of the free memory. What goes wrong here is nobody's concern: the stage reads the same files, and
says it better. Imports no torch.
"""

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, Self

import psutil

from lowvram import prepared
from lowvram.contents import weight_paths
from lowvram.devices import DTYPE_NAMES
from lowvram.progress import OnProgress, Progress
from lowvram.repository import Model

_ROLES = {
    "encode-image": "vae",
    "encode": "text_encoder",
    "denoise": "transformer",
    "decode": "vae",
}
_BUFFER_BYTES = 1 << 20
# A call reads so many times into the same buffer. After each the thread has to wait for the
# interpreter, which imports give up every 5 ms only: by single buffers 0.2 GB/s would be the most.
_BUFFERS = 64
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA's, under WSL2, AMD's
_PATIENCE = 1.0  # seconds for the chunk that is being read; a network is not waited for
_SHARE = 0.5  # of the free memory


class ReadAhead:
    """Reads for a stage that is carried out within this context, in a thread of its own.

    Attributes:
        bytes: that a disk had to give, once the context is left; 0 where Linux does not say it.
    """

    def __init__(
        self, stage: str, tasks: Sequence[Mapping[str, Any]], on_progress: OnProgress
    ) -> None:
        """`tasks` as `request.tasks.to_json` gives them, of one model."""
        self.bytes = 0
        self._stage, self._tasks, self._on_progress = stage, tasks, on_progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lowvram-ahead", daemon=True)

    def __enter__(self) -> Self:
        with suppress(RuntimeError):  # no more threads are allowed
            if self._stage in _ROLES:
                self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(_PATIENCE)

    def hear(self, progress: Progress) -> None:
        """To be told the stage's progress, which goes on to whom it is for.

        With the first of it most is imported, and nothing is read ahead any more: the stage finds
        out what it reads, which may be nothing (embeddings that are kept).
        """
        self._stop.set()
        self._on_progress(progress)

    def _run(self) -> None:
        with suppress(Exception):  # see above
            most = int(_SHARE * psutil.virtual_memory().available)
            for path in files_of(self._stage, self._tasks):
                if most <= 0 or self._stop.is_set():
                    break
                most -= self._read(path, most)
        # Of this thread alone: a process's own account has what its children have read, too.
        with suppress(Exception):
            told = Path("/proc/thread-self/io").read_text(encoding="ascii")
            self.bytes = int(told.partition("\nread_bytes: ")[2].split()[0])

    def _read(self, path: Path, most: int) -> int:
        """Read a file, at most so much; how much of it is in the page cache now.

        Of a chunk its end is asked for: what the system reads ahead by itself comes in order.
        """
        done, buffers = 0, [bytearray(_BUFFER_BYTES)] * _BUFFERS
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            while done < min(size, most) and not self._stop.is_set():
                end = min(done + _BUFFERS * _BUFFER_BYTES, size)
                if not _is_cached(file.fileno(), end - 1):
                    _read_into(file, buffers, done)
                done = end
        return done


def files_of(stage: str, tasks: Sequence[Mapping[str, Any]]) -> list[Path]:
    """The weights that a stage will read: prepared, or the model's own as far as they are here."""
    if stage == "encode":
        tasks = [task for task in tasks if not task["embeds"]]  # for the others nothing is loaded
    if not tasks:
        return []
    task, role = tasks[0], _ROLES[stage]
    model = Model.from_record(task["model"])
    weights = task["weights"] if task.get("weights") in ("8bit", "4bit") else "whole"
    wanted = prepared.describe(model, role, weights, _dtype(model, role, task))
    folder = prepared.placed(wanted)
    return weight_paths(model, role) if folder is None else sorted(folder.glob("*.safetensors"))


def _dtype(model: Model, role: str, task: Mapping[str, Any]) -> str:
    """What the stage will compute in: `devices.choose_dtype`, as far as no torch is needed."""
    if task["dtype"] != "auto":
        return DTYPE_NAMES[task["dtype"]]
    default = model.get_family().component(role).dtype
    without = task["device"] in ("cpu", "mps") or (task["device"] == "auto" and not _has_gpu())
    return "float32" if default == "float16" and without else default


def _has_gpu() -> bool:
    """Whether a card that computes float16 well may be there."""
    if sys.platform != "linux":
        return sys.platform == "win32"
    return any(Path(each).exists() for each in _GPU_DEVICES)


def _read_into(file: FileIO, buffers: list[bytearray], position: int) -> None:
    """Fill buffers from a position on, as far as the file goes."""
    if hasattr(os, "preadv"):
        os.preadv(file.fileno(), buffers, position)
        return
    file.seek(position)
    for buffer in buffers:
        file.readinto(buffer)


def _is_cached(descriptor: int, position: int) -> bool:
    """Whether a byte of a file is in the page cache; False where the system cannot tell."""
    try:
        return os.preadv(descriptor, [bytearray(1)], position, os.RWF_NOWAIT) == 1
    except (AttributeError, OSError):  # BlockingIOError: it is not
        return False
