"""One prepared component for every model that has the same: which of them it serves."""

import json
from pathlib import Path

from lowvram.contents import component_key, effective, weight_bytes
from lowvram.errors import LowvramError
from lowvram.files import fingerprint
from lowvram.manifest import Prepared
from lowvram.repository import Model


def content_of(model: Model, role: str) -> dict[str, int]:
    """What a manifest says of the source it was made from: its key, and the bytes of its weights.

    Raises:
        ModelError: its files are not here and cannot be asked for.
    """
    return {component_key(model, role): weight_bytes(model, role) or 0}


def same_content(model: Model, role: str, made: Prepared) -> bool:
    """Whether what was prepared from another source serves this model's component too.

    Reads a folder's weights only where their size makes it likely, and only once.
    """
    source = model.sources[role]
    try:
        if source.kind != "hub":
            folder = source.folder / model.subfolder(role)
            if fingerprint(folder) != source.revision:
                return False  # it has changed: whoever loads it says so
        size = weight_bytes(model, role)
        if size is not None and size not in made.contents.values():
            return False
        return component_key(model, role) in made.contents
    except LowvramError:  # not to be had: whoever loads it says so
        return False


def same_files(folder: Path, made: Prepared, other_folder: Path, other: Prepared) -> bool:
    """Whether two prepared components are the same bytes, and configurations that compute the same.

    Sources that are cut into other files, or tensors into another order, become equal here.
    """
    if set(made.files) != set(other.files):
        return False
    for name, facts in made.files.items():
        if facts["sha256"] == other.files[name]["sha256"]:
            continue
        if not name.endswith("config.json"):
            return False
        ours, theirs = (
            json.loads((each / name).read_text(encoding="utf-8")) for each in (folder, other_folder)
        )
        if effective(ours) != effective(theirs):
            return False
    return True
