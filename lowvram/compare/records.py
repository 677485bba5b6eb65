"""Each distinct stage once: what was done already, here or in an interrupted comparison, is used.

What a stage makes is determined by its task and the tensors that it reads. Beside the files lies
a record of both, x.denoise.json, with the stage's report; a file is taken again where they match
and it is still as it was written.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lowvram import artifacts
from lowvram.errors import ArtifactError
from lowvram.files import sha256_of
from lowvram.request.tasks import AnyTask, to_json

_INPUTS = {"encode": "", "denoise": "embeds", "decode": "latents"}
_KINDS = {"encode": "embeds", "denoise": "latents"}
_RESULTS = ("output", "steps_down")  # say nothing of what is computed
_LIBRARIES = ("lowvram", "torch", "transformers", "diffusers", "bitsandbytes")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """A stage that is done.

    Attributes:
        variant: whose stage it was, by its name.
        paths: of the artifact, or of the pictures.
        items: one record per prompt or picture.
        report: `StageReport.to_json()`.
    """

    variant: str
    paths: list[Path]
    items: list[dict[str, Any]]
    report: dict[str, Any]


class Records:
    """Remembers what was done, in memory and beside the files."""

    def __init__(self) -> None:
        self._done: dict[str, Done] = {}

    def carry(
        self, variant: str, stage: str, task: AnyTask, carry: Callable[[], Mapping[str, Any]]
    ) -> Done:
        """The stage's result: as it was made before, or by calling `carry`.

        Raises:
            LowvramError: what the stage raised.
        """
        identity = _identity(stage, task)
        found = self._done.get(identity)
        if found is not None:
            log.info("%s: %s is that of %s", variant, stage, found.variant)
            return found
        record = Path(f"{Path(task.output).with_suffix('')}.{stage}.json")
        result = _recorded(record, stage, identity)
        if result is not None:
            log.info("%s: %s was done before", variant, stage)
        else:
            made = carry()
            result = {name: made[name] for name in ("paths", "items", "report")}
            names = {"identity": identity, "contents": _contents(stage, result["paths"])}
            artifacts.write_bytes(record, json.dumps({**names, **result}).encode())
        paths = [Path(path) for path in result["paths"]]
        self._done[identity] = Done(variant, paths, result["items"], result["report"])
        return self._done[identity]


def _identity(stage: str, task: AnyTask) -> str:
    """sha256 of all that determines what a stage makes; files count by their contents."""
    fields = {name: value for name, value in to_json(task).items() if name not in _RESULTS}
    read: dict[str, Any] = {}
    if _INPUTS[stage]:
        header = artifacts.read_header(Path(fields.pop(_INPUTS[stage])))
        read = {
            "tensors": header.tensors,
            "items": header.items,
            "requested": header.settings.get("requested"),
        }
    for name, value in fields.items():
        if isinstance(value, str) and value and _is_file(value):
            fields[name] = sha256_of(value)
    versions = {name: _version(name) for name in _LIBRARIES}
    told = {"stage": stage, "task": fields, "reads": read, "versions": versions}
    return hashlib.sha256(artifacts.canonical_json(told).encode()).hexdigest()


def _recorded(record: Path, stage: str, identity: str) -> dict[str, Any] | None:
    """What an earlier comparison left, if it is of this task and its files are whole."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        if found["identity"] != identity:
            return None
        if found["contents"] != _contents(stage, found["paths"]):
            return None
    except (OSError, ValueError, KeyError, TypeError, ArtifactError):
        return None
    return dict(found)


def _contents(stage: str, paths: list[str]) -> list[str]:
    """A key for each file; an artifact's is checked against its tensors.

    Raises:
        OSError, ArtifactError: one is not there, or damaged.
    """
    if stage in _KINDS:
        return [artifacts.verify(Path(path), _KINDS[stage]).key for path in paths]
    return [sha256_of(path) for path in paths]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long, or no path at all
        return False
