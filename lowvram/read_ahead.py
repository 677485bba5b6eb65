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

from lowvram import prepared
from lowvram.contents import weight_paths
from lowvram.devices import DTYPE_NAMES, WITHOUT_FLOAT16
from lowvram.memory.host import available_bytes
from lowvram.repository import Model
from lowvram.stages.dispatch import COMPONENTS

_BUFFER_BYTES = 1 << 20
# A call reads so many times into the same buffer. After each the thread has to wait for the
# interpreter, which imports give up every 5 ms only: by single buffers 0.2 GB/s would be the most.
_BUFFERS = 64
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA's, under WSL2, AMD's
_PATIENCE = 1.0  # seconds for the chunk that is being read; a network is not waited for
_SHARE = 0.5  # of the free memory


class ReadAhead:
    """Reads for a stage that is carried out within this context, in a thread of its own."""

    def __init__(self, stage: str, tasks: Sequence[Mapping[str, Any]]) -> None:
        """`tasks` as `request.tasks.to_json` gives them, of one model."""
        self._stage, self._tasks, self._bytes = stage, tasks, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lowvram-ahead", daemon=True)

    def __enter__(self) -> Self:
        with suppress(RuntimeError):  # no more threads are allowed
            if self._stage in COMPONENTS or self._stage == "plan":
                self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended()

    def stop(self) -> None:
        """The stage has begun: what it reads it knows itself now, and it may be nothing
        (embeddings that are kept).
        """
        self._stop.set()

    def ended(self) -> int:
        """Stop, and wait for that; the bytes that a disk had to give, 0 where Linux does not say
        it.
        """
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(_PATIENCE)
        return self._bytes

    def _run(self) -> None:
        with suppress(Exception):  # see above
            most = int(_SHARE * available_bytes())
            for path in files_of(self._stage, self._tasks):
                if most <= 0 or self._stop.is_set():
                    break
                most -= self._read(path, most)
        # Of this thread alone: a process's own account has what its children have read, too.
        with suppress(Exception):
            told = Path("/proc/thread-self/io").read_text(encoding="ascii")
            self._bytes = int(told.partition("\nread_bytes: ")[2].split()[0])

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
    """The weights that a stage will read: prepared, or the model's own as far as they are here.
    Planning reads none, and what it plans first comes after it.
    """
    if stage == "plan":
        stage = read_for(stage, tasks)
        tasks = [row[stage] for row in tasks if stage in row]
    if stage == "encode":
        tasks = [task for task in tasks if not task["embeds"]]  # for the others nothing is loaded
    if not tasks:
        return []
    task, role = tasks[0], COMPONENTS[stage][0]
    model = Model.from_record(task["model"])
    weights = task["weights"] if task.get("weights") in ("8bit", "4bit") else "whole"
    wanted = prepared.describe(model, role, weights, _dtype(model, role, task))
    folder = prepared.placed(wanted)
    if folder is not None:
        return sorted(folder.glob("*.safetensors"))
    return [path for path in weight_paths(model, role) if path.is_file()]


def read_for(stage: str, tasks: Sequence[Mapping[str, Any]]) -> str:
    """The stage whose weights are read while this one starts: of a plan the first that it plans."""
    return next(iter(tasks[0])) if stage == "plan" and tasks else stage


def _dtype(model: Model, role: str, task: Mapping[str, Any]) -> str:
    """What the stage will compute in: `devices.choose_dtype`, as far as no torch is needed."""
    if task["dtype"] != "auto":
        return DTYPE_NAMES[task["dtype"]]
    default, device = model.get_family().component(role).dtype, task["device"]
    kind = _likely_device() if device == "auto" else device.partition(":")[0]
    return "float32" if default == "float16" and kind in WITHOUT_FLOAT16 else default


def _likely_device() -> str:
    """What "auto" may come to, by the type's name in torch."""
    if sys.platform != "linux":
        return "mps" if sys.platform == "darwin" else "cuda"
    return "cuda" if any(Path(each).exists() for each in _GPU_DEVICES) else "cpu"


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
