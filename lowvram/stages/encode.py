"""Encode: prompts to embeddings, with the text encoder alone on the device.

Each text is encoded once however often it is wanted, by itself, and only its real tokens (unless
the task asks for the padding of the diffusers pipeline). By itself, because in bfloat16 a text's
neighbours in a batch move its embeddings by enough to change pixels by 3 levels of 255.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowvram import prepared
from lowvram.component import Used, use
from lowvram.devices import choose_device, choose_dtype, dtype_name
from lowvram.errors import translated
from lowvram.families.family import Family
from lowvram.memory.budget import untracked
from lowvram.memory.meter import Meter, StageReport
from lowvram.progress import OnProgress, Progress, ignore
from lowvram.repository import Model
from lowvram.request.encode import EncodeTask
from lowvram.stages.embeddings import Work
from lowvram.stages.given import write_given
from lowvram.stages.lookup import Lookup, look_up
from lowvram.stages.result import (
    Made,
    OnOutcome,
    Outcomes,
    StageResult,
    StageResults,
    report_stage,
    shared_settings,
    unheard,
)
from lowvram.stages.texts import Reader, Text
from lowvram.weights.checkpoint import Loaded, Weights, broken_files_named, find_class

if TYPE_CHECKING:
    import torch

    from lowvram.stages.decision import Decision

log = logging.getLogger(__name__)

_OR_STREAM = ", or --weights stream (run: --encoder-weights stream)"


def encode(task: EncodeTask, on_progress: OnProgress = ignore) -> StageResult:
    """Write the embeddings of every prompt and negative prompt to `task.output`.

    Raises:
        RequestError: given embeddings are not what is needed.
        ModelError, DeviceError, MemoryExhaustedError, StorageError: as their names say.
        NonFiniteError: the encoder computed NaN or infinity; nothing is written.
    """
    return encode_each([task], on_progress).only()


@translated("encode")
def encode_each(
    tasks: Sequence[EncodeTask],
    on_progress: OnProgress = ignore,
    on_outcome: OnOutcome = unheard,
) -> StageResults:
    """Write the embeddings of every task, with the text encoder loaded once.

    Args:
        tasks: of one model, and alike in weights, dtype, device and budgets. A text that several
            want is encoded once.
        on_outcome: told of each task as soon as its file is written, or what went wrong with it.

    Raises:
        ModelError, DeviceError, MemoryExhaustedError: what concerns all tasks that are left.
    """
    outcomes = Outcomes(len(tasks), on_outcome)
    report = _take_given(tasks, outcomes)
    if not (left := outcomes.open()):
        return StageResults(outcomes.in_order(), report)
    task = tasks[left[0]]
    model = Model.from_record(task.model)
    family = model.get_family()
    component = family.component("text_encoder")
    device = choose_device(task.device, warns=True)
    dtype, dtype_reason = choose_dtype(task.dtype, component.dtype, device)
    with Meter(device) as meter:
        on_progress(Progress("encode", "reading the prompts"))
        jobs = list(Reader(family, load_tokenizer(model)).jobs(tasks, outcomes))
        if not jobs:
            return StageResults(outcomes.in_order(), report)
        work = Work(jobs, outcomes)
        lookup = look_up(task, model, work.texts, dtype_name(dtype), device.type)
        name, decision = lookup.complete(work.texts), None
        if not name:
            decision = _decide(task, model, lookup.missing(work.texts), device, dtype)
            name = decision.strategy.name
        work.settings = {"weights": name, "dtype": dtype_name(dtype), "device": device.type}
        kept = {text for text, made in lookup.take(name, work.texts) if work.put(text, made)}
        missing = [text for text in work.texts if text not in kept]
        if missing and decision is None:  # deleted a moment ago
            decision = _decide(replace(task, weights=name), model, missing, device, dtype)
        reasons = [f"{len(kept)} of {len(work.texts)} texts from cache"] if kept else []
        used: Used[None] = Used(None, 0, [], [])
        if missing:
            assert decision is not None
            stored = "whole" if name == "stream" else name
            folder, note = prepared.fetch(model, "text_encoder", stored, dtype_name(dtype))
            told = [f"weights {name}: {decision.reason}", f"{dtype_name(dtype)}: {dtype_reason}"]
            reasons = [*told, *([note] if note else []), *reasons]
            log.info("encode on %s, %s", device, "; ".join(reasons))
            on_progress(Progress("encode", "loading the text encoder"))

            def encode_missing(loaded: Loaded) -> None:
                _encode_all(missing, work, lookup, family, loaded, on_progress, meter.mark)

            used = use(
                component.class_name,
                folder,
                decision.strategy,
                device,
                meter,
                decision.room,
                encode_missing,
            )
            lookup.close()
        else:
            log.info("encode: %s, nothing is loaded", reasons[0])
    report = report_stage(
        meter,
        "encode",
        name if missing else "from cache",
        dtype_name(dtype),
        reasons,
        used,
        {
            "model": model.public_record()["name"],
            **shared_settings([work.settings_of(job) for job in jobs]),
            "negative_prompts": list(
                dict.fromkeys(text for job in jobs for text in job.task.negative_prompts)
            ),
        },
        decision,
    )
    return StageResults(outcomes.in_order(), report)


def _take_given(tasks: Sequence[EncodeTask], outcomes: Outcomes) -> StageReport | None:
    """Write what was given instead of a text; the report of the last."""
    report = None
    for index, task in enumerate(tasks):
        if task.embeds:
            with outcomes.of(index):
                result = write_given(task)
                report = result.report
                outcomes.settle(index, Made(result.paths, result.items))
    return report


def _decide(
    task: EncodeTask,
    model: Model,
    texts: Sequence[Text],
    device: "torch.device",
    dtype: "torch.dtype",
) -> "Decision[Weights]":
    from lowvram.stages.decision import decide
    from lowvram.stages.options.encoder import Texts, encoder_options  # imports torch

    wanted = Texts(len(texts), max(len(text.ids) for text in texts))
    return decide(
        "encode",
        task,
        device,
        dtype_name(dtype),
        lambda room: encoder_options(model, task.weights, dtype, device, room, wanted),
        "" if task.weights in ("auto", "stream") else _OR_STREAM,
    )


def load_tokenizer(model: Model) -> Any:
    tokenizer_class = find_class(model.get_family().component("tokenizer").class_name)
    folder, _ = prepared.fetch(model, "tokenizer", "", "")
    with broken_files_named(folder):
        return tokenizer_class.from_pretrained(folder, local_files_only=True)


def _encode_all(
    texts: Sequence[Text],
    work: Work,
    lookup: Lookup,
    family: Family,
    loaded: Loaded,
    on_progress: OnProgress,
    on_text: Callable[[str], None],
) -> None:
    """Embeddings of each of the texts."""
    import torch

    done = itertools.count(1)

    def call(text: Text) -> Callable[[], None]:
        ids = torch.tensor([text.ids]).to(loaded.inputs)
        mask = torch.tensor([text.mask]).to(loaded.inputs)

        def encoded() -> None:
            found = family.encode(loaded.model, ids, mask)
            made = {name: tensor[0].cpu() for name, tensor in found.items()}
            on_text(f"text {next(done)}")
            with untracked():
                if work.put(text, made):
                    lookup.keep(work.settings["weights"], text, made)

        return encoded

    loaded.each(
        [call(text) for text in texts],
        lambda done, total: on_progress(Progress("encode", "encoding", done, total)),
    )
