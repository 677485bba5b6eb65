"""What a component is by its content: the same wherever its files lie and whatever they are called.

The models of a family are published each with the same text encoder, 19 GB of it. What is made from
it (prepared weights, embeddings) serves all of them, and is found by this key. Imports no torch.

The Hub names a large file by the sha256 of its bytes, and so does its cache: nothing is read, or
even downloaded. In other folders the bytes are read once, and what was found is remembered beside
the file's size and times.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowvram import artifacts
from lowvram.errors import LowvramError, ModelError
from lowvram.files import (
    STEMS,
    Source,
    find,
    missing_weights,
    named_in_index,
    read_json,
    sha256_of,
    sha256_on_hub,
    user_cache,
    weight_names,
)
from lowvram.repository import Model

_TOKENIZER = (
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Entries of configurations that change nothing of what a network computes: names, versions, the
# dtype of the files (which is in them), what only training, generation or a decoder uses, and what
# T5's configuration derives from `feed_forward_proj`.
_IDLE = {
    "_name_or_path", "name_or_path", "_class_name", "_diffusers_version", "transformers_version",
    "architectures", "torch_dtype", "dtype", "tokenizer_file", "special_tokens_map_file",
    "dropout", "dropout_rate", "classifier_dropout", "initializer_factor", "use_cache",
    "output_past", "n_positions", "task_specific_params", "num_decoder_layers",
    "decoder_start_token_id", "is_encoder_decoder", "dense_act_fn", "is_gated_act",
}  # fmt: skip


def component_key(model: Model, role: str) -> str:
    """The identity of a component by its content, 64 hexadecimal digits.

    Equal for equal weights and configurations, under other names and at other places too. Files
    that are cut otherwise are other files, though their tensors be the same.

    Raises:
        ModelError: its files are not here and cannot be asked for.
    """
    component = model.get_family().component(role)
    source, subfolder = model.sources[role], model.subfolder(role)
    facts: dict[str, Any] = {"class": component.class_name if component.dtype else role}
    if component.dtype:
        facts["config"] = effective(model.config(role))
        names = _weight_files(model, role)
        if model.is_pickled(role):
            names = [f"{STEMS['diffusers']}.bin"]
        if not names:
            folder = source.folder / subfolder
            raise ModelError(f"{folder} has no {missing_weights(folder)}: check the folder")
        facts["files"] = sorted(_sha256(source, subfolder, name) for name in names)
    elif component.needs:
        facts["files"] = dict(_small_files(source, subfolder))
    else:
        config = model.config(role)
        facts["config"] = {"_class_name": config.get("_class_name"), **effective(config)}
    return hashlib.sha256(artifacts.canonical_json(facts).encode()).hexdigest()


def weight_bytes(model: Model, role: str) -> int | None:
    """Of a component's weight files; None where they are not here. 0 for parts without weights.

    Raises:
        ModelError: its index cannot be read.
    """
    component = model.get_family().component(role)
    if not component.dtype:
        return 0
    paths = weight_paths(model, role)
    try:
        return sum(path.stat().st_size for path in paths) if paths else None
    except OSError:
        return None


def weight_paths(model: Model, role: str) -> list[Path]:
    """Where a component's weight files are, or would be; they are not downloaded. Empty where
    nothing of it is here.

    Raises:
        ModelError: its index cannot be read.
    """
    config = find(model.sources[role], _join(model.subfolder(role), "config.json"))
    names = _weight_files(model, role)
    return [] if config is None else [config.parent / name for name in names]


def effective(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a configuration that change what is computed."""
    return {name: value for name, value in config.items() if name not in _IDLE}


def file_sha256(path: Path) -> str:
    """Of a file's bytes: read once, then remembered for as long as its size and times stay.

    Raises:
        ModelError: it cannot be read.
    """
    if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", path.resolve().name):
        return path.resolve().name  # as the Hub's cache keeps large files
    try:
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
        note = user_cache() / "sha256" / f"{digest[:32]}.json"
        with suppress(OSError, ValueError, TypeError, KeyError):
            known = json.loads(note.read_text(encoding="utf-8"))
            if known["stamp"] == stamp:
                return str(known["sha256"])
        found = sha256_of(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): check the file") from None
    with suppress(LowvramError):  # a cache that cannot be written costs time only
        artifacts.write_bytes(note, json.dumps({"stamp": stamp, "sha256": found}).encode())
    return found


def _weight_files(model: Model, role: str) -> list[str]:
    """Names of the safetensors that a component consists of; none where a folder has none."""
    source, subfolder = model.sources[role], model.subfolder(role)
    if source.kind != "hub":
        return weight_names(source.folder / subfolder)
    stem = STEMS[model.get_family().component(role).class_name.split(".")[0]]
    index = find(source, _join(subfolder, f"{stem}.safetensors.index.json"))
    return [f"{stem}.safetensors"] if index is None else named_in_index(index)


def _sha256(source: Source, subfolder: str, name: str) -> str:
    """Of a large file, which need not be here when it lies on the Hub."""
    if source.kind != "hub":
        return file_sha256(source.folder / subfolder / name)
    config = find(source, _join(subfolder, "config.json"))
    if config is not None and (config.parent / name).is_file():
        return file_sha256(config.parent / name)
    return sha256_on_hub(source, _join(subfolder, name))


def _small_files(source: Source, subfolder: str) -> Iterator[tuple[str, Any]]:
    for name in _TOKENIZER:
        path = find(source, _join(subfolder, name))
        if path is not None and name.endswith("_config.json"):
            yield name, effective(read_json(path))
        elif path is not None:
            yield name, sha256_of(path)


def _join(subfolder: str, name: str) -> str:
    return f"{subfolder}/{name}".removeprefix("/")
