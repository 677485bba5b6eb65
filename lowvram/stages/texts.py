"""What the encode stage reads: prompts as the tokens that the encoder gets, each text once."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

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
    """

    index: int
    task: EncodeTask
    items: list[dict[str, Any]]
    texts: list[dict[str, Text]]

    def distinct(self) -> set[Text]:
        """All that it needs."""
        return {text for item in self.texts for text in item.values()}


class Reader:
    """Reads prompts with a tokenizer; what it has to say of one it says once."""

    def __init__(self, family: Family, tokenizer: Any) -> None:
        self._family = family
        self._tokenizer = tokenizer
        self._warned: set[str] = set()

    def jobs(self, tasks: Iterable[EncodeTask], outcomes: Outcomes) -> Iterator[Job]:
        """The tasks that can be done; what is wrong with the others is their outcome."""
        for index, task in enumerate(tasks):
            with outcomes.of(index):
                yield self._job(index, task)

    def _job(self, index: int, task: EncodeTask) -> Job:
        items: list[dict[str, Any]] = []
        texts: list[dict[str, Text]] = []
        for prompt, negative in zip(task.prompts, task.negative_prompts, strict=True):
            text, tokens, dropped = self._readable(prompt, "prompt", task)
            if not text:
                raise RequestError(
                    f"nothing is left of the prompt “{prompt[:60]}” after cleaning: "
                    "say it otherwise, or use --no-clean"
                )
            negative_text, negative_tokens, negative_dropped = self._readable(
                negative, "negative prompt", task
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
            texts.append({"": self._text(text, task), "negative_": self._text(negative_text, task)})
        return Job(index, task, items, texts)

    def _text(self, text: str, task: EncodeTask) -> Text:
        made = self._tokenizer(
            text,
            padding="max_length" if task.padding == "max" else False,
            max_length=task.max_tokens,
            truncation=True,
        )
        return Text(tuple(made.input_ids), tuple(made.attention_mask), text)

    def _readable(self, prompt: str, what: str, task: EncodeTask) -> tuple[str, int, str]:
        """The text as it will be encoded, its number of tokens, and what is cut off its end."""
        text = self._family.clean(prompt, task.clean_caption)
        control = [token for token in self._tokenizer.all_special_tokens if token in text]
        for token in control:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        said = f"the {what} “{_shortened(prompt)}”"
        if control:
            self._warn(f"{control[0]} in {said} is not a control token: read as plain text")
        ids = self._tokenizer(text).input_ids
        if len(ids) <= task.max_tokens:
            return text, len(ids), ""
        dropped = self._tokenizer.decode(ids[task.max_tokens - 1 : -1])
        self._warn(
            f"{said} has {len(ids)} tokens and {task.max_tokens} fit; "
            f"dropped from its end: “{dropped}”"
        )
        return text, task.max_tokens, dropped

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s", message)


def _shortened(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 50 else f"{words[:49]}…"
