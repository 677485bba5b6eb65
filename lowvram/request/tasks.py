"""The tasks of all stages, and how they travel between processes."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from lowvram.request.decode import DecodeTask
from lowvram.request.denoise import DenoiseTask
from lowvram.request.encode import EncodeTask
from lowvram.request.encode_image import EncodeImageTask

AnyTask = EncodeTask | EncodeImageTask | DenoiseTask | DecodeTask
Task = TypeVar("Task", bound=AnyTask)


def to_json(task: AnyTask) -> dict[str, Any]:
    """The task as JSON types."""
    return asdict(task)


def from_json(kind: type[Task], value: Mapping[str, Any]) -> Task:
    """The task that `to_json` described."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    return kind(**fields)
