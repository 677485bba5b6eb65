"""A stage by its name, with tasks and results as JSON types: how `run` and the worker call it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowvram import errors
from lowvram.errors import LowvramError
from lowvram.progress import OnProgress
from lowvram.request.decode import DecodeTask
from lowvram.request.denoise import DenoiseTask
from lowvram.request.encode import EncodeTask
from lowvram.request.encode_image import EncodeImageTask
from lowvram.request.tasks import from_json
from lowvram.stages.decode import decode_each
from lowvram.stages.denoise import check_each, denoise_each
from lowvram.stages.encode import encode_each
from lowvram.stages.encode_image import encode_image_each
from lowvram.stages.result import Outcome
from lowvram.stages.sampling import Callback

# What a stage takes, and the function that carries out a list of it.
_STAGES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "encode-image": (EncodeImageTask, encode_image_each),
    "encode": (EncodeTask, encode_each),
    "denoise": (DenoiseTask, denoise_each),
    "decode": (DecodeTask, decode_each),
}
STAGES = tuple(_STAGES)
# Roles of what each computes with, that whose weights it loads first.
COMPONENTS = {
    "encode-image": ("vae",),
    "encode": ("text_encoder",),
    "denoise": ("transformer", "scheduler"),
    "decode": ("vae",),
}

# A task's place in the list, and what came of it: {"paths", "items"}, or an error as `told` has it.
OnTold = Callable[[int, dict[str, Any]], None]


def carry_out(
    stage: str,
    tasks: Sequence[Mapping[str, Any]],
    on_progress: OnProgress,
    on_outcome: OnTold,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """Run one stage in this process.

    Args:
        stage: "encode-image", "encode", "denoise" or "decode"; or "check", for whether denoise
            tasks can be done, or "plan", for whether all stages keep within their budgets.
        tasks: as `request.tasks.to_json` gives them; for "plan" a row's tasks of all stages, by
            name.
        on_outcome: told of each task as soon as it is known; for "check" and "plan" of those only
            that cannot be done.
        callback: as `denoise_each` takes it.

    Returns:
        "report": `StageReport` as JSON types; None for "check" and "plan", and where nothing could
        be done.

    Raises:
        LowvramError: what concerns all tasks that nothing has come of yet.
    """

    def hear(index: int, outcome: Outcome) -> None:
        on_outcome(index, told(outcome))

    if stage == "check":
        check_each([from_json(DenoiseTask, task) for task in tasks], hear)
        return {"report": None}
    if stage == "plan":
        from lowvram.stages.plan import check_budgets

        rows = [
            {name: from_json(_STAGES[name][0], task) for name, task in row.items()} for row in tasks
        ]
        check_budgets(rows, hear)
        return {"report": None}
    if stage == "measure":
        from lowvram.compare.differences import measure

        return {"report": measure(tasks[0])}
    kind, each = _STAGES[stage]
    seen = {"callback": callback} if stage == "denoise" else {}
    results = each([from_json(kind, task) for task in tasks], on_progress, hear, **seen)
    return {"report": None if results.report is None else results.report.to_json()}


def told(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON types."""
    if isinstance(outcome, LowvramError):
        return {"error": type(outcome).__name__, "message": str(outcome)}
    return {"paths": [str(path) for path in outcome.paths], "items": outcome.items}


def error_of(outcome: Mapping[str, Any]) -> LowvramError | None:
    """The error that `told` has told of; None where there is none."""
    if "error" not in outcome:
        return None
    kind = getattr(errors, outcome["error"])
    return kind(outcome["message"]) if issubclass(kind, LowvramError) else None
