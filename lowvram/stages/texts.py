"""What the encode stage reads: prompts as the tokens that the encoder gets, each text once."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unicodedata import category

from lowvram import emphasis
from lowvram.errors import RequestError
from lowvram.families.family import Family
from lowvram.request.encode import EncodeTask
from lowvram.stages.result import Outcomes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """A text as the encoder gets it: equal ones are encoded once.

    Attributes:
        ids, mask: of its tokens, padding included where the task asks for it.
        says: its words, for messages.
    """

    ids: tuple[int, ...]
    mask: tuple[int, ...]
    says: str = field(compare=False, default="")


@dataclass(frozen=True)
class Job:
    """One task: the record of each prompt, and its texts by their prefix in the artifact.

    Attributes:
        index: of the task in the stage's list.
        items: as in the artifact's header.
        texts: of each item, "" the prompt's and "negative_" the negative prompt's.
        weights: of each of their tokens; empty where all weigh 1.
    """

    index: int
    task: EncodeTask
    items: list[dict[str, Any]]
    texts: list[dict[str, Text]]
    weights: list[dict[str, tuple[float, ...]]]

    def distinct(self) -> set[Text]:
        """All that it needs."""
        return {text for item in self.texts for text in item.values()}


@dataclass(frozen=True)
class _Read:
    record: dict[str, Any]
    text: Text
    weights: tuple[float, ...]
    says_nothing: bool  # has the tokens of an empty text, or nothing but invisible characters


class Reader:
    """Reads prompts with a tokenizer; what it has to say of one it says once."""

    def __init__(self, family: Family, tokenizer: Any) -> None:
        self._family = family
        self._tokenizer = tokenizer
        self._nothing: list[int] = tokenizer("").input_ids
        self._warned: set[str] = set()

    def jobs(self, tasks: Iterable[EncodeTask], outcomes: Outcomes) -> Iterator[Job]:
        """The tasks that can be done; what is wrong with the others is their outcome."""
        for index, task in enumerate(tasks):
            if not outcomes.is_open(index):
                continue
            with outcomes.of(index):
                yield self._job(index, task)

    def _job(self, index: int, task: EncodeTask) -> Job:
        items: list[dict[str, Any]] = []
        texts: list[dict[str, Text]] = []
        weights: list[dict[str, tuple[float, ...]]] = []
        for prompt, negative in zip(task.prompts, task.negative_prompts, strict=True):
            if note := self._family.prompt_note(task.model["name"], prompt):
                said = f"nothing in the prompt “{_shortened(prompt)}” is known here"
                self._warn(said, "" if note in self._warned else f": {note}")
                self._warned.add(note)
            read = {
                "": self._read(prompt, "prompt", task),
                "negative_": self._read(negative, "negative prompt", task),
            }
            if read[""].says_nothing:
                cleaned = task.clean_caption and not read[""].record["text"]
                raise RequestError(
                    f"nothing is left of the prompt {prompt[:60]!r} for the text encoder: "
                    f"say it otherwise{', or use --no-clean' if cleaned else ''}"
                )
            items.append(
                {"prompt": prompt, "negative_prompt": negative}
                | {f"{p}{name}": v for p, each in read.items() for name, v in each.record.items()}
            )
            texts.append({prefix: each.text for prefix, each in read.items()})
            weights.append({prefix: each.weights for prefix, each in read.items()})
        return Job(index, task, items, texts, weights)

    def _read(self, prompt: str, what: str, task: EncodeTask) -> "_Read":
        """A prompt or negative prompt: what is recorded of it, its tokens and their weights."""
        segments = emphasis.parse(prompt) if task.weighting else []
        words = emphasis.plain(segments) if task.weighting else prompt
        said = f"the {what} “{_shortened(prompt)}”"
        text = self._plain(self._family.clean(words, task.clean_caption), said)
        ids = self._tokenizer(text).input_ids
        cut = len(ids) > task.max_tokens
        dropped = self._tokenizer.decode(ids[task.max_tokens - 1 : -1]) if cut else ""
        if cut:
            self._warn(
                f"{said} has {len(ids)} tokens and {task.max_tokens} fit; "
                f"dropped from its end: “{_ends_of(dropped)}”"
            )
        record = {"text": text, "tokens": min(len(ids), task.max_tokens), "dropped": dropped}
        weighted = any(segment.weight != 1 for segment in segments)
        made = self._tokenizer(
            text,
            padding="max_length" if task.padding == "max" else False,
            max_length=task.max_tokens,
            truncation=True,
            return_offsets_mapping=weighted,
        )
        weights: tuple[float, ...] = ()
        if weighted:
            record["weights"] = [[segment.text, segment.weight] for segment in segments]
            read = text[: max(end for _, end in made.offset_mapping)]
            of_characters = emphasis.of_characters(segments, read)
            weights = emphasis.of_tokens(of_characters, read, made.offset_mapping)
        read_as = Text(tuple(made.input_ids), tuple(made.attention_mask), text)
        return _Read(record, read_as, weights, ids == self._nothing or _is_invisible(text))

    def _plain(self, text: str, said: str) -> str:
        """Without control tokens, which would be read as such wherever they come from."""
        # Of one character is the padding of CLIP's second tokenizer, "!", which it reads as text.
        special = [token for token in self._tokenizer.all_special_tokens if len(token) > 1]
        control = [token for token in special if token in text]
        for token in control:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        if control:
            self._warn(f"{control[0]} in {said} is not a control token: read as plain text")
        return text

    def _warn(self, message: str, more: str = "") -> None:
        """Say it once, whatever more there is to say."""
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s", message + more)


def _shortened(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 50 else f"{words[:49]}…"


def _is_invisible(text: str) -> bool:
    """Whether it is format characters alone, which some tokenizers read as an unknown word."""
    return all(each.isspace() or category(each) == "Cf" for each in text)


def _ends_of(text: str) -> str:
    return text if len(text) <= 210 else f"{text[:100]} … {text[-100:]}"
