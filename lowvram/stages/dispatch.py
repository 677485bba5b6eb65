"""A stage by its name, with tasks and results as JSON types: how `run` and the worker call it."""

from collections.abc import Mapping
from typing import Any

from lowvram.progress import OnProgress
from lowvram.request.decode import DecodeTask
from lowvram.request.denoise import DenoiseTask
from lowvram.request.encode import EncodeTask
from lowvram.request.encode_image import EncodeImageTask
from lowvram.request.tasks import from_json
from lowvram.stages.decode import decode
from lowvram.stages.denoise import check, denoise
from lowvram.stages.encode import encode
from lowvram.stages.encode_image import encode_image

STAGES = ("encode", "denoise", "decode")


def carry_out(stage: str, task: Mapping[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """Run one stage in this process.

    Args:
        stage: "encode", "encode-image", "denoise" or "decode"; or "check", for whether a denoise
            task can be done, or "plan", for whether all keep within their budgets.
        task: as `request.tasks.to_json` gives it; for "plan" those of all stages, by name.

    Returns:
        `StageResult` as JSON types: "paths", "items", "report".

    Raises:
        LowvramError: as the stage does.
    """
    if stage == "check":
        check(from_json(DenoiseTask, task))
        return {}
    if stage == "plan":
        from lowvram.stages.plan import check_budget

        image = task.get("encode-image")
        check_budget(
            from_json(EncodeTask, task["encode"]),
            from_json(DenoiseTask, task["denoise"]),
            from_json(DecodeTask, task["decode"]),
            image=None if image is None else from_json(EncodeImageTask, image),
        )
        return {}
    if stage == "encode":
        result = encode(from_json(EncodeTask, task), on_progress)
    elif stage == "denoise":
        result = denoise(from_json(DenoiseTask, task), on_progress)
    elif stage == "encode-image":
        result = encode_image(from_json(EncodeImageTask, task), on_progress)
    else:
        result = decode(from_json(DecodeTask, task), on_progress)
    return {
        "paths": [str(path) for path in result.paths],
        "items": result.items,
        "report": result.report.to_json(),
    }
