"""Encode: prompts to embeddings, with the text encoder alone on the device.

Each text is encoded once however often it is wanted, by itself, and only its real tokens (unless
the task asks for the padding of the diffusers pipeline). By itself, because in bfloat16 a text's
neighbours in a batch move its embeddings by enough to change pixels by 3 levels of 255.
"""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts, prepared
from lowvram.component import use
from lowvram.devices import choose_device, choose_dtype, dtype_name
from lowvram.errors import NonFiniteError, RequestError, translated
from lowvram.families.family import Family
from lowvram.memory.meter import Meter
from lowvram.progress import OnProgress, Progress, ignore
from lowvram.repository import Model
from lowvram.request.encode import EncodeTask
from lowvram.stages.result import StageResult, report_stage
from lowvram.weights.checkpoint import Loaded, broken_files_named, find_class

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_OR_STREAM = ", or --weights stream (run: --encoder-weights stream)"

Texts = tuple[str, ...]  # texts, each once, in the order in which they are first wanted


@translated("encode")
def encode(task: EncodeTask, on_progress: OnProgress = ignore) -> StageResult:
    """Write the embeddings of every prompt and negative prompt to `task.output`.

    Raises:
        ModelError, DeviceError, MemoryExhaustedError, StorageError: as their names say.
        NonFiniteError: the encoder computed NaN or infinity; nothing is written.
    """
    from lowvram.stages.decision import decide
    from lowvram.stages.options.encoder import Texts as Wanted  # imports torch
    from lowvram.stages.options.encoder import encoder_options

    model = Model.from_record(task.model)
    family = model.get_family()
    component = family.component("text_encoder")
    device = choose_device(task.device)
    dtype, dtype_reason = choose_dtype(task.dtype, component.dtype, device)
    with Meter(device) as meter:
        on_progress(Progress("encode", "reading the prompts"))
        tokenizer = _load_tokenizer(model)
        items, texts = _prepare(task, family, tokenizer)
        longest = max(max(item["tokens"], item["negative_tokens"]) for item in items)
        tokens = task.max_tokens if task.padding == "max" else longest
        wanted = Wanted(len(texts), tokens)
        decision = decide(
            "encode",
            task,
            device,
            dtype_name(dtype),
            lambda room: encoder_options(model, task.weights, dtype, device, room, wanted),
            "" if task.weights in ("auto", "stream") else _OR_STREAM,
        )
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
        used = use(
            component.class_name,
            folder,
            weights,
            device,
            meter,
            decision.room,
            lambda loaded: _encode_all(
                task, family, tokenizer, loaded, texts, on_progress, meter.mark
            ),
        )
        header = artifacts.Header(
            kind="embeds",
            model=task.model,
            settings={
                "weights": weights.name,
                "dtype": dtype_name(dtype),
                "device": device.type,
                "clean_caption": task.clean_caption,
                "padding": task.padding,
                "max_tokens": task.max_tokens,
            },
            items=items,
        )
        artifacts.write(Path(task.output), header, _by_item(items, used.result))
    report = report_stage(
        meter,
        "encode",
        weights.name,
        dtype_name(dtype),
        reasons,
        used,
        {
            "model": model.public_record()["name"],
            **header.settings,
            "negative_prompts": list(dict.fromkeys(task.negative_prompts)),
        },
        budget_bytes=decision.room.bytes if decision.room.option else None,
        predicted=decision.predicted,
    )
    return StageResult([Path(task.output)], items, report)


def _load_tokenizer(model: Model) -> Any:
    tokenizer_class = find_class(model.get_family().component("tokenizer").class_name)
    folder, _ = prepared.fetch(model, "tokenizer", "", "")
    with broken_files_named(folder):
        return tokenizer_class.from_pretrained(folder, local_files_only=True)


def _prepare(
    task: EncodeTask, family: Family, tokenizer: Any
) -> tuple[list[dict[str, Any]], Texts]:
    """The record of each prompt, and the texts to encode, each once."""
    items: list[dict[str, Any]] = []
    for prompt, negative in zip(task.prompts, task.negative_prompts, strict=True):
        text, tokens, dropped = _readable(prompt, task, family, tokenizer)
        if not text:
            raise RequestError(
                f"nothing is left of the prompt “{prompt[:60]}” after cleaning: "
                "say it otherwise, or use --no-clean"
            )
        negative_text, negative_tokens, negative_dropped = _readable(
            negative, task, family, tokenizer
        )
        items.append(
            {
                "prompt": prompt,
                "text": text,
                "tokens": tokens,
                "dropped": dropped,
                "negative_prompt": negative,
                "negative_text": negative_text,
                "negative_tokens": negative_tokens,
                "negative_dropped": negative_dropped,
            }
        )
    texts = [item["text"] for item in items] + [item["negative_text"] for item in items]
    return items, tuple(dict.fromkeys(texts))


def _readable(
    prompt: str, task: EncodeTask, family: Family, tokenizer: Any
) -> tuple[str, int, str]:
    """The text as it will be encoded, its number of tokens, and what is cut off its end."""
    text = family.clean(prompt, task.clean_caption)
    # Of one character is the padding of CLIP's second tokenizer, "!", which it reads as text.
    special = [token for token in tokenizer.all_special_tokens if len(token) > 1]
    control = [token for token in special if token in text]
    for token in control:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    if control:
        log.warning("%s in the prompt is not a control token: read as plain text", control[0])
    ids = tokenizer(text).input_ids
    if len(ids) <= task.max_tokens:
        return text, len(ids), ""
    dropped = tokenizer.decode(ids[task.max_tokens - 1 : -1])
    log.warning(
        "the prompt has %d tokens and %d fit; dropped from its end: “%s”",
        len(ids),
        task.max_tokens,
        dropped,
    )
    return text, task.max_tokens, dropped


def _encode_all(
    task: EncodeTask,
    family: Family,
    tokenizer: Any,
    loaded: Loaded,
    texts: Texts,
    on_progress: OnProgress,
    on_text: Callable[[str], None],
) -> "dict[str, dict[str, Tensor]]":
    """What the family makes of each text, on the host."""
    done = itertools.count(1)
    inputs = [
        tokenizer(
            text,
            padding="max_length" if task.padding == "max" else False,
            max_length=task.max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        for text in texts
    ]

    def call(ids: "Tensor", mask: "Tensor") -> "Callable[[], dict[str, Tensor]]":
        ids, mask = ids.to(loaded.inputs), mask.to(loaded.inputs)

        def encoded() -> "dict[str, Tensor]":
            made = family.encode(loaded.model, ids, mask)
            made = {name: tensor.cpu() for name, tensor in made.items()}
            on_text(f"text {next(done)}")
            return made

        return encoded

    results = loaded.each(
        [call(each.input_ids, each.attention_mask) for each in inputs],
        lambda done, total: on_progress(Progress("encode", "encoding", done, total)),
    )
    encoded: dict[str, dict[str, Tensor]] = {}
    for text, made in zip(texts, results, strict=True):
        if not all(tensor.isfinite().all() for tensor in made.values()):
            raise NonFiniteError(
                f"the text encoder gave NaN or infinity in {made['prompt_embeds'].dtype} for "
                f"“{text[:60]}”: encode with --weights whole --dtype bf16 or fp32"
            )
        encoded[text] = {name: tensor[0] for name, tensor in made.items()}
    return encoded


def _by_item(
    items: list[dict[str, Any]], encoded: "dict[str, dict[str, Tensor]]"
) -> "dict[str, Tensor]":
    """Tensors by their names in the artifact: "0.prompt_embeds", "0.negative_prompt_embeds", …"""
    return {
        f"{index}.{prefix}{name}": tensor.clone()
        for index, item in enumerate(items)
        for prefix, text in (("", item["text"]), ("negative_", item["negative_text"]))
        for name, tensor in encoded[text].items()
    }
