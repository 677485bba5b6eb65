"""Encode: prompts to embeddings, with the text encoder alone on the device.

Each text is encoded once however often it is wanted, by itself, and only its real tokens (unless
the task asks for the padding of the diffusers pipeline). By itself, because in bfloat16 a text's
neighbours in a batch move its embeddings by enough to change pixels by 3 levels of 255.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts, prepared
from lowvram.component import use
from lowvram.devices import choose_device, choose_dtype, dtype_name
from lowvram.errors import NonFiniteError, translated
from lowvram.families.family import Family
from lowvram.memory.budget import untracked
from lowvram.memory.meter import Meter
from lowvram.progress import OnProgress, Progress, ignore
from lowvram.repository import Model
from lowvram.request.encode import EncodeTask
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
from lowvram.stages.texts import Job, Reader, Text
from lowvram.weights.checkpoint import Loaded, Weights, broken_files_named, find_class

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowvram.stages.decision import Decision

log = logging.getLogger(__name__)

_OR_STREAM = ", or --weights stream (run: --encoder-weights stream)"


def encode(task: EncodeTask, on_progress: OnProgress = ignore) -> StageResult:
    """Write the embeddings of every prompt and negative prompt to `task.output`.

    Raises:
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
    task = tasks[0]
    outcomes = Outcomes(len(tasks), on_outcome)
    model = Model.from_record(task.model)
    component = model.get_family().component("text_encoder")
    device = choose_device(task.device)
    dtype, dtype_reason = choose_dtype(task.dtype, component.dtype, device)
    with Meter(device) as meter:
        on_progress(Progress("encode", "reading the prompts"))
        jobs = list(Reader(model.get_family(), _load_tokenizer(model)).jobs(tasks, outcomes))
        if not jobs:
            return StageResults(outcomes.in_order(), None)
        work = Work(jobs, outcomes)
        decision = _decide(task, model, work.texts, device, dtype)
        weights = decision.strategy
        stored = "whole" if weights.name == "stream" else weights.name
        folder, note = prepared.fetch(model, "text_encoder", stored, dtype_name(dtype))
        reasons = [
            f"weights {weights.name}: {decision.reason}",
            f"{dtype_name(dtype)}: {dtype_reason}",
            *([note] if note else []),
        ]
        log.info("encode on %s, %s", device, "; ".join(reasons))
        on_progress(Progress("encode", "loading the text encoder"))
        work.settings = {
            "weights": weights.name,
            "dtype": dtype_name(dtype),
            "device": device.type,
        }
        used = use(
            component.class_name,
            folder,
            weights,
            device,
            meter,
            decision.room,
            lambda loaded: _encode_all(work, model.get_family(), loaded, on_progress, meter.mark),
        )
    report = report_stage(
        meter,
        "encode",
        weights.name,
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
        budget_bytes=decision.room.bytes if decision.room.option else None,
        predicted=decision.predicted,
    )
    return StageResults(outcomes.in_order(), report)


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


def _load_tokenizer(model: Model) -> Any:
    tokenizer_class = find_class(model.get_family().component("tokenizer").class_name)
    folder, _ = prepared.fetch(model, "tokenizer", "", "")
    with broken_files_named(folder):
        return tokenizer_class.from_pretrained(folder, local_files_only=True)


class Work:
    """The texts of all jobs, each once, and what has become of them.

    A job's file is written as soon as its last text is there, and a text is dropped with the last
    job that wants it.

    Attributes:
        texts: to be encoded, in the order in which they are first wanted.
        settings: what all files say of how they were made.
    """

    def __init__(self, jobs: Sequence[Job], outcomes: Outcomes) -> None:
        self._outcomes = outcomes
        self._wanted_by: dict[Text, list[Job]] = {}
        for job in jobs:
            for text in dict.fromkeys(text for item in job.texts for text in item.values()):
                self._wanted_by.setdefault(text, []).append(job)
        self._missing = {job.index: job.distinct() for job in jobs}
        self._embeds: dict[Text, Tensor] = {}
        self.texts = list(self._wanted_by)
        self.settings: dict[str, Any] = {}

    def settings_of(self, job: Job) -> dict[str, Any]:
        """Every setting that changed a byte."""
        return {
            **self.settings,
            "clean_caption": job.task.clean_caption,
            "padding": job.task.padding,
            "max_tokens": job.task.max_tokens,
        }

    def put(self, text: Text, embeds: "Tensor") -> None:
        """Take in the embeddings of a text, `[tokens, channels]` on the host."""
        if not embeds.isfinite().all():
            error = (
                f"the text encoder gave NaN or infinity in {embeds.dtype} for “{text.says[:60]}”: "
                "encode with --weights whole --dtype bf16 or fp32"
            )
            for job in self._wanted_by[text]:
                self._outcomes.settle(job.index, NonFiniteError(error))
            return
        self._embeds[text] = embeds
        for job in self._wanted_by[text]:
            missing = self._missing[job.index]
            missing.discard(text)
            if not missing and self._outcomes.is_open(job.index):
                self._write(job)
                for each in job.distinct():
                    self._drop(each)

    def _write(self, job: Job) -> None:
        header = artifacts.Header("embeds", job.task.model, self.settings_of(job), job.items)
        with self._outcomes.of(job.index):
            path = Path(job.task.output)
            artifacts.write(path, header, self._by_item(job))
            self._outcomes.settle(job.index, Made([path], job.items))

    def _drop(self, text: Text) -> None:
        if not any(self._outcomes.is_open(job.index) for job in self._wanted_by[text]):
            self._embeds.pop(text, None)

    def _by_item(self, job: Job) -> "dict[str, Tensor]":
        """Tensors by their names in the artifact: "0.prompt_embeds", …, each with a storage of its
        own, as safetensors wants it.
        """
        import torch

        tensors = {}
        for index, texts in enumerate(job.texts):
            for prefix, text in texts.items():
                tensors[f"{index}.{prefix}prompt_embeds"] = self._embeds[text].clone()
                tensors[f"{index}.{prefix}prompt_attention_mask"] = torch.tensor(text.mask)
        return tensors


def _encode_all(
    work: Work,
    family: Family,
    loaded: Loaded,
    on_progress: OnProgress,
    on_text: Callable[[str], None],
) -> None:
    """Embeddings of each text."""
    import torch

    done = itertools.count(1)

    def call(text: Text) -> Callable[[], None]:
        ids = torch.tensor([text.ids]).to(loaded.inputs)
        mask = torch.tensor([text.mask]).to(loaded.inputs)

        def encoded() -> None:
            embeds = family.encode(loaded.model, ids, mask)[0].cpu()
            on_text(f"text {next(done)}")
            with untracked():
                work.put(text, embeds)

        return encoded

    loaded.each(
        [call(text) for text in work.texts],
        lambda done, total: on_progress(Progress("encode", "encoding", done, total)),
    )
