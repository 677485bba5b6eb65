"""Embeddings on their way from single texts to the files of the tasks that want them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts
from lowvram.errors import NonFiniteError
from lowvram.stages.result import Made, Outcomes
from lowvram.stages.texts import Job, Text

if TYPE_CHECKING:
    from torch import Tensor


class Work:
    """The texts of all jobs, each once, and what has become of them.

    A job's file is written as soon as its last text is there, and a text is dropped with the last
    job that wants it.

    Attributes:
        texts: in the order in which they are first wanted.
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
            "weighting": job.task.weighting,
        }

    def put(self, text: Text, embeds: "Tensor") -> bool:
        """Take in the embeddings of a text, `[tokens, channels]` on the host.

        Returns:
            whether they are numbers; else all who want them have failed.
        """
        if not embeds.isfinite().all():
            error = (
                f"the text encoder gave NaN or infinity in {embeds.dtype} for “{text.says[:60]}”: "
                "encode with --weights whole --dtype bf16 or fp32"
            )
            for job in self._wanted_by[text]:
                self._outcomes.settle(job.index, NonFiniteError(error))
            return False
        self._embeds[text] = embeds
        for job in self._wanted_by[text]:
            missing = self._missing[job.index]
            missing.discard(text)
            if not missing and self._outcomes.is_open(job.index):
                self._write(job)
                for each in job.distinct():
                    self._drop(each)
        return True

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
                embeds = _weighted(self._embeds[text], job.weights[index][prefix])
                tensors[f"{index}.{prefix}prompt_embeds"] = embeds
                tensors[f"{index}.{prefix}prompt_attention_mask"] = torch.tensor(text.mask)
        return tensors


def _weighted(embeds: "Tensor", weights: tuple[float, ...]) -> "Tensor":
    """A copy in which each token is multiplied by its weight; without weights the same bits."""
    import torch

    if not weights:
        return embeds.clone()
    return (embeds.float() * torch.tensor(weights)[:, None]).to(embeds.dtype)
