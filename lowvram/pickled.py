"""Weights that are published as a pickle only, turned into safetensors once.

A pickle can run code when it is loaded. Only those that a family names are read (see
`Published.pickled`), and by torch's restricted reader, which builds tensors and plain containers.
Imports no torch until then.
"""

import hashlib
import logging
import os
import shutil
from pathlib import Path

from lowvram.errors import LowvramError, ModelError, first_line, storage_error
from lowvram.files import STEMS, Source, file_of, missing_weights, user_cache

log = logging.getLogger(__name__)

_STEM = STEMS["diffusers"]


def unpickled(source: Source, subfolder: str, folder: Path) -> Path:
    """A folder with a component's configuration and safetensors, in this package's cache.

    Args:
        folder: where its configuration lies.

    Raises:
        ModelError: the pickle is not to be had, or holds more than tensors.
        StorageError: the cache cannot be written.
    """
    from filelock import FileLock

    name = f"{source.place}\0{source.revision}\0{subfolder}"
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    target = user_cache() / "unpickled" / f"{Path(source.place).name}-{digest}"
    if _is_made(target):
        return target
    pickle = file_of(source, f"{subfolder}/{_STEM}.bin".lstrip("/"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if not _is_made(target):
                log.info(
                    "%s is published as a pickle: converted once, into %s", source.place, target
                )
                _convert(pickle, folder, target)
    except OSError as error:
        raise storage_error(error, "converting") from None
    return target


def _is_made(target: Path) -> bool:
    return (target / "config.json").is_file() and not missing_weights(target)


def _convert(pickle: Path, folder: Path, target: Path) -> None:
    import torch
    from safetensors.torch import save_file

    try:
        state = torch.load(pickle, map_location="cpu", weights_only=True, mmap=True)
        tensors = {str(name): tensor.contiguous() for name, tensor in state.items()}
    except OSError:
        raise
    except Exception as error:
        raise ModelError(
            f"{pickle} is not read, for it holds more than tensors ({first_line(error)[:100]}): "
            "use another model"
        ) from None
    part = target.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        shutil.copy(folder / "config.json", part)
        save_file(tensors, part / f"{_STEM}.safetensors", {"format": "pt"})
        with open(part / f"{_STEM}.safetensors", "rb+") as file:
            os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
    except (LowvramError, OSError):
        shutil.rmtree(part, ignore_errors=True)
        raise
