"""The tasks of all stages, and how they travel between processes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from lowvram.artifacts import canonical_json
from lowvram.request.decode import DecodeTask
from lowvram.request.denoise import DenoiseTask
from lowvram.request.encode import EncodeTask
from lowvram.request.encode_image import EncodeImageTask

AnyTask = EncodeTask | EncodeImageTask | DenoiseTask | DecodeTask
Task = TypeVar("Task", bound=AnyTask)


@dataclass(frozen=True)
class Tasks:
    """What was asked of the stages of one run, a refiner's too.

    Attributes:
        image: of encode-image, which comes first where a picture is started from.
    """

    encode: EncodeTask
    denoise: DenoiseTask
    decode: DecodeTask
    image: EncodeImageTask | None = None

    def by_stage(self) -> dict[str, AnyTask]:
        """By the names of the stages, in order."""
        first: dict[str, AnyTask] = {} if self.image is None else {"encode-image": self.image}
        return first | {"encode": self.encode, "denoise": self.denoise, "decode": self.decode}


def to_json(task: AnyTask) -> dict[str, Any]:
    """The task as JSON types."""
    return asdict(task)


def from_json(kind: type[Task], value: Mapping[str, Any]) -> Task:
    """The task that `to_json` described."""
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    return kind(**given)


def alike(task: AnyTask, *own: str) -> str:
    """A text that is equal for tasks which differ in nothing but their `own` fields.

    What a later field says is shared unless it is named: nothing that differs is ever mixed.
    """
    unknown = set(own) - {field.name for field in fields(task)}
    assert not unknown, unknown
    return canonical_json({k: v for k, v in to_json(task).items() if k not in own})
