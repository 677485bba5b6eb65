"""Which texts of an encode stage are in the cache, and what is still to be encoded."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowvram import embeds_cache
from lowvram.embeds_cache import EmbedsCache, computed_alike
from lowvram.repository import Model
from lowvram.request.encode import EncodeTask
from lowvram.stages.texts import Text

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

# What "auto" may take on a device, where resident and streamed weights are kept apart.
_LOSSLESS = ("whole", "stream")


@dataclass
class Lookup:
    """The cache as one stage sees it.

    Attributes:
        caches: by strategy, "whole" first; empty where there is no cache.
        held: the texts that each of them has.
    """

    caches: dict[str, EmbedsCache]
    held: dict[str, set[Text]]

    def complete(self, texts: Sequence[Text]) -> str:
        """A strategy by which every text is there; "" where there is none."""
        return next((name for name, held in self.held.items() if held.issuperset(texts)), "")

    def missing(self, texts: Sequence[Text]) -> list[Text]:
        """What is not there by every strategy that may be taken."""
        held = set.intersection(*self.held.values()) if self.held else set()
        return [text for text in texts if text not in held]

    def take(self, weights: str, texts: Sequence[Text]) -> "Iterator[tuple[Text, Tensor]]":
        """The embeddings that are there by a strategy, one after the other."""
        for text in texts:
            if text in self.held.get(weights, ()):
                embeds = self.caches[weights].get(text)
                if embeds is not None:  # not deleted meanwhile
                    yield text, embeds

    def keep(self, weights: str, text: Text, embeds: "Tensor") -> None:
        """Keep a text for later runs."""
        if weights in self.caches:
            self.caches[weights].put(text, embeds)

    def close(self) -> None:
        """Bring the cache back to its size, after texts were added."""
        if self.caches:
            embeds_cache.trim(embeds_cache.limit_bytes())


def look_up(
    task: EncodeTask, model: Model, texts: Sequence[Text], dtype: str, device: str
) -> Lookup:
    """Look for the texts of a stage by every strategy that the task allows."""
    key = None
    if task.cache and embeds_cache.limit_bytes():
        key = embeds_cache.encoder_key(model)
    if key is None:
        return Lookup({}, {})
    names = _LOSSLESS if task.weights == "auto" else (task.weights,)
    caches = {
        name: EmbedsCache(model, key, computed_alike(name, device), dtype, device) for name in names
    }
    known: dict[str, set[Text]] = {}
    for name in names:  # two names for one way of computing are looked for once
        alike = computed_alike(name, device)
        if alike not in known:
            known[alike] = {text for text in texts if caches[name].holds(text)}
    return Lookup(caches, {name: known[computed_alike(name, device)] for name in names})
