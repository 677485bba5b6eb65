"""Embeddings that somebody else has made: checked, and written as the encode stage would.

No text encoder is loaded. Prompts are labels then: one for each text of the file.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts
from lowvram.component import Used
from lowvram.devices import dtype_name
from lowvram.errors import RequestError, first_line
from lowvram.files import sha256_of
from lowvram.memory.meter import Meter
from lowvram.repository import Model
from lowvram.request.encode import EncodeTask
from lowvram.stages.result import StageResult, report_stage

if TYPE_CHECKING:
    from torch import Tensor

PREFIXES = ("", "negative_")

log = logging.getLogger(__name__)


def write_given(task: EncodeTask) -> StageResult:
    """Write the embeddings of `task.embeds` to `task.output`, in their own dtype.

    Raises:
        RequestError: the file is not what is needed; names the way out.
        StorageError: as its name says.
    """
    import torch

    model = Model.from_record(task.model)
    with Meter(torch.device("cpu")) as meter:
        tensors = read_given(task)
        items = [_item(task, tensors, index) for index in range(len(task.prompts))]
        dtype = dtype_name(tensors["prompt_embeds"].dtype)
        settings = {
            "weights": "given",
            "dtype": dtype,
            "given": sha256_of(task.embeds),
        }
        header = artifacts.Header(kind="embeds", model=task.model, settings=settings, items=items)
        named = {
            f"{index}.{name}": tensor[index].contiguous().clone()
            for name, tensor in tensors.items()
            for index in range(len(items))
        }
        artifacts.write(Path(task.output), header, named)
    reason = f"embeddings as given: {task.embeds}"
    log.info("encode: %s", reason)
    used = Used(None, 0, [], [])
    settings = {"model": model.public_record()["name"], **settings}
    report = report_stage(meter, "encode", "given", dtype, [reason], used, settings)
    return StageResult([Path(task.output)], items, report)


def read_given(task: EncodeTask) -> "dict[str, Tensor]":
    """The file's tensors: `prompt_embeds` `[prompts, tokens, channels]` and
    `prompt_attention_mask` `[prompts, tokens]`, and the same of the negative prompts, which may be
    absent. Masks that are absent are ones.

    Raises:
        RequestError: unreadable, missing, of another shape, or not finite.
    """
    import torch
    from safetensors import safe_open

    try:
        with safe_open(task.embeds, framework="pt") as file:
            ours = artifacts.METADATA_KEY in (file.metadata() or {})
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise _refused(task, f"cannot be read ({first_line(error)[:100]})") from None
    if ours:
        holds, verb = ("latents", "decode") if "latents" in found else ("embeddings", "denoise")
        raise RequestError(
            f"--embeds {task.embeds} holds {holds} that lowvram made: lowvram {verb} it"
        )
    if "prompt_embeds" not in found:
        raise _refused(task, "has no tensor prompt_embeds")
    model = Model.from_record(task.model)
    channels = model.get_family().text_channels(model.config("transformer"))
    tensors = {}
    for prefix in PREFIXES:
        embeds = found.pop(f"{prefix}prompt_embeds", None)
        if embeds is None:
            continue
        shape = (len(task.prompts), embeds.shape[1] if embeds.dim() == 3 else 0, channels)
        if tuple(embeds.shape) != shape or not embeds.is_floating_point():
            raise _refused(
                task,
                f"has {prefix}prompt_embeds of shape {list(embeds.shape)}, where "
                f"[{len(task.prompts)}, tokens, {channels}] is needed",
            )
        if not embeds.isfinite().all():
            raise _refused(task, f"has NaN or infinity in {prefix}prompt_embeds")
        mask = found.pop(f"{prefix}prompt_attention_mask", None)
        mask = torch.ones(shape[:2], dtype=torch.int64) if mask is None else mask.to(torch.int64)
        if tuple(mask.shape) != shape[:2] or not set(mask.unique().tolist()) <= {0, 1}:
            raise _refused(
                task, f"has a {prefix}prompt_attention_mask that is no {list(shape[:2])} of 0 and 1"
            )
        tensors[f"{prefix}prompt_embeds"] = embeds
        tensors[f"{prefix}prompt_attention_mask"] = mask
    if found:
        raise _refused(task, f"has a tensor {min(found)}, which nothing uses")
    return tensors


def _item(task: EncodeTask, tensors: "dict[str, Tensor]", index: int) -> dict[str, Any]:
    """The record of one prompt, as the encode stage writes it."""
    counts = {
        f"{prefix}tokens": int(tensors[f"{prefix}prompt_attention_mask"][index].sum())
        if f"{prefix}prompt_embeds" in tensors
        else 0
        for prefix in PREFIXES
    }
    prompt = task.prompts[index]
    labels = {"prompt": prompt, "text": prompt, "negative_prompt": "", "negative_text": ""}
    return {**labels, **counts, "dropped": "", "negative_dropped": ""}


def _refused(task: EncodeTask, why: str) -> RequestError:
    return RequestError(
        f"--embeds {task.embeds} {why}: give a safetensors file with prompt_embeds "
        "[prompts, tokens, channels] and prompt_attention_mask [prompts, tokens], and with "
        "negative_ before both of them for guidance"
    )
