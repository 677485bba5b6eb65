"""Prepare: write once what every later run reads, verified before it counts.

The text encoder and the transformer in the dtype they compute in and in streaming order, or the
text encoder quantised; and its tokenizer in the form that loads without a conversion. Everything is
made tensor by tensor, on the CPU, in the memory that a few tensors need, then read back from the
disk and compared with a second conversion. The VAE is small and left alone. What is interrupted is
started anew, component by component.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lowvram import artifacts, prepared, prepared_folders
from lowvram.artifacts import fsync_folder
from lowvram.errors import (
    DeviceError,
    MemoryExhaustedError,
    ModelError,
    RequestError,
    StorageError,
    first_line,
    is_out_of_memory,
)
from lowvram.families.family import Component
from lowvram.files import absolute
from lowvram.manifest import MANIFEST, Prepared, read_manifest
from lowvram.memory.plan import show
from lowvram.progress import OnProgress, Progress, ignore
from lowvram.repository import Model
from lowvram.sharing import content_of
from lowvram.weights.checkpoint import Weights, broken_files_named, find_class
from lowvram.weights.conversion import Conversion
from lowvram.weights.quantized import Quantized
from lowvram.weights.tensor_files import DamagedFileError
from lowvram.weights.whole import Whole

log = logging.getLogger(__name__)

_SMALL_FILES_BYTES = 16_000_000  # configuration, index, manifest and tokenizer, with room

# Given the source's folder and a new one: fills it, and returns the sha256 of what it has verified.
_Fill = Callable[[Path, Path], Mapping[str, str]]

# Ordinary text, other scripts, what T5 reads as control tokens, odd spaces, and a long text.
_TEXTS = (
    "A large blue star on a yellow background.",
    "naïve café, 東京の夜, Привет мир, مرحبا, 🦙🎨 ﬁ ½ e\u0301 \u200b",
    "</s> <pad> <unk> <extra_id_0> a<extra_id_99>b </s>",
    "  two  spaces\tand\na new line  ",
    "",
    "an oil painting of an old lighthouse at night, " * 40,
)


def prepare(
    model: Model, weights: str = "bf16", to: Path | None = None, on_progress: OnProgress = ignore
) -> list[Prepared]:
    """Prepare a model's components.

    Args:
        weights: "bf16" for every large component in the dtype it computes in (the transformer's is
            float16); "8bit" or "4bit" for the text encoder, quantised.
        to: a folder to put them in; None for the cache. The stages find them there too.

    Returns:
        what was made, or found already there.

    Raises:
        RequestError: unknown weights. ModelError: the source is not to be had, damaged or
        quantised already. DeviceError: bitsandbytes is not installed. StorageError: no space, not
        writable, or the disk gave back something else. Nothing unfinished counts or stays.
    """
    import torch

    if weights not in prepared.WEIGHTS:
        raise RequestError(f"--weights {weights} is not known: use {', '.join(prepared.WEIGHTS)}")
    components = [
        component
        for component in model.get_family().components
        if component.blocks and (weights == "bf16" or component.role == "text_encoder")
    ]
    made = [_prepare_tokenizer(model, to, on_progress)]
    for component in components:
        strategy: Weights
        if weights == "bf16":
            strategy = Whole(getattr(torch, component.dtype))
        else:
            strategy = Quantized(int(weights[0]), torch.bfloat16)
        made.append(_prepare_weights(model, component, strategy, to, on_progress))
    return made


def _prepare_weights(
    model: Model, component: Component, strategy: Weights, to: Path | None, on_progress: OnProgress
) -> Prepared:
    if isinstance(strategy, Quantized):
        _check_bitsandbytes(strategy.name)
    dtype = str(strategy.dtype).removeprefix("torch.")
    wanted = prepared.describe(model, component.role, strategy.name, dtype)
    title = component.role.replace("_", " ")

    def fill(source: Path, part: Path) -> dict[str, str]:
        conversion = Conversion(
            find_class(component.class_name), source, strategy, component.blocks
        )
        _check_space(part, conversion.total_bytes + _SMALL_FILES_BYTES)
        total = _megabytes(conversion.total_bytes)

        def tell(doing: str, done: int) -> None:
            on_progress(Progress("prepare", f"{doing} {title} (MB)", _megabytes(done), total))

        conversion.write(part, lambda done: tell("writing", done))
        return conversion.verify(part, lambda done: tell("verifying", done))

    return _make(model, wanted, to, on_progress, fill)


def _prepare_tokenizer(model: Model, to: Path | None, on_progress: OnProgress) -> Prepared:
    wanted = prepared.describe(model, "tokenizer", "", "")
    tokenizer_class = find_class(wanted.class_name)

    def fill(source: Path, part: Path) -> dict[str, str]:
        with broken_files_named(source):
            tokenizer = tokenizer_class.from_pretrained(source, local_files_only=True)
        _check_space(part, _SMALL_FILES_BYTES)
        tokenizer.save_pretrained(part)
        again = tokenizer_class.from_pretrained(part, local_files_only=True)
        _check_same_tokens(tokenizer, again, part)
        return {}

    return _make(model, wanted, to, on_progress, fill)


def _make(
    model: Model, wanted: Prepared, to: Path | None, on_progress: OnProgress, fill: _Fill
) -> Prepared:
    """What is there already, or else made now; other processes wait for it."""
    title = wanted.role.replace("_", " ")
    target = prepared_folders.place(wanted, to and absolute(to))
    on_wait = Progress("prepare", f"waiting for another process to finish the {title}")
    with (
        _out_of_memory_named(title),
        prepared_folders.locked(target, on_wait=lambda: on_progress(on_wait)),
    ):
        if to is None:
            there = prepared.find(model, wanted.role, wanted.weights, wanted.dtype)
            found = read_manifest(there) if there else None
        else:
            there, found = target, prepared.read(target, wanted)
        before = found.contents if found else {}
        if found is not None and not prepared.is_intact(there or target, found):
            log.warning("the %s at %s is damaged: made again", title, there)
            found, target = None, there or target
        if found is not None:
            if found.source == wanted.source:
                prepared_folders.point(wanted, target)
            else:
                log.info("the %s is the same as that of %s", title, found.model)
            log.info("the %s is prepared already: %s", title, there)
            return found
        on_progress(Progress("prepare", f"reading {title}"))
        source = model.fetch(wanted.role)
        wanted = replace(wanted, versions={name: version(name) for name in _packages(wanted)})
        wanted = replace(wanted, contents={**before, **content_of(model, wanted.role)})
        made = _build(wanted, target, lambda part: _filled(fill, source, part))
        twin = prepared.adopted(made, target) if to is None else None
        if twin is not None:
            with prepared_folders.storage_errors(target):
                prepared_folders.delete(target)
                prepared_folders.forget(target)
            log.info("the %s is the same as that of %s: %s", title, twin[1].model, twin[0])
            return twin[1]
    log.info("prepared the %s: %s (%.1f MB)", title, target, made.bytes / 1e6)
    return made


def _build(wanted: Prepared, target: Path, fill: Callable[[Path], Mapping[str, str]]) -> Prepared:
    """Make a component's folder, whole or not at all. What is ours at its place is replaced.

    Raises:
        StorageError: no space, not writable, or something else lies there. Whatever `fill` raises.
    """
    part = prepared_folders.part_of(target)
    with prepared_folders.storage_errors(target):
        for old in (target, part):
            if old.exists():
                prepared_folders.check_ours(old)
                prepared_folders.delete(old)
        part.parent.mkdir(parents=True, exist_ok=True)
        prepared_folders.point(wanted, target)
        try:
            part.mkdir()
            (part / prepared_folders.MARK).touch()
            files = _recorded(part, fill(part))
            made = replace(wanted, files=files, made=datetime.now(UTC).isoformat("T", "seconds"))
            artifacts.write_bytes(part / MANIFEST, made.to_text().encode())
            (part / prepared_folders.MARK).unlink()
            fsync_folder(part)
            os.replace(part, target)
            fsync_folder(target.parent)
        except BaseException:
            if part.is_dir():
                prepared_folders.delete(part)
            prepared_folders.forget(target)
            raise
    return made


def _recorded(folder: Path, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file, each seen onto the disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name != prepared_folders.MARK:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
                digest = digests.get(path.name) or hashlib.file_digest(file, "sha256").hexdigest()
            files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return files


def _filled(fill: _Fill, source: Path, part: Path) -> Mapping[str, str]:
    try:
        digests: Mapping[str, str] = fill(source, part)
    except DamagedFileError as error:
        raise StorageError(
            f"{part} did not hold what was written to it ({error}), and is deleted: "
            "check the disk and its cable, or choose another disk with --to"
        ) from None
    return digests


def _packages(wanted: Prepared) -> list[str]:
    """That the result may depend on."""
    library = wanted.class_name.partition(".")[0]
    return [library, "torch"] + (["bitsandbytes"] if wanted.weights != "whole" else [])


@contextmanager
def _out_of_memory_named(title: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryExhaustedError(
            f"preparing the {title} ran out of memory ({first_line(error)[:200]}): "
            "close other programs; a few GB are needed"
        ) from None


def _check_bitsandbytes(name: str) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise DeviceError(
            f"{name} needs bitsandbytes, which is not installed: "
            "pip install bitsandbytes, or use --weights bf16"
        ) from None


def _check_space(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part).free
    if free < needed:
        raise StorageError(
            f"{part.parent} has {show(free)} free and {show(needed)} are needed: "
            "free some space, or choose another disk with --to"
        )


def _check_same_tokens(tokenizer: Any, again: Any, part: Path) -> None:
    for text in _TEXTS:
        if tokenizer(text).input_ids != again(text).input_ids:
            raise ModelError(
                f"the tokenizer reads “{text[:40]}” otherwise once saved in {part}: "
                "please report it"
            )
    if again.all_special_tokens != tokenizer.all_special_tokens:
        raise ModelError("the tokenizer has other control tokens once saved: please report it")


def _megabytes(count: int) -> int:
    return -(-count // 1_000_000)
