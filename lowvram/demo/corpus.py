"""Scenes and their captions in bulk, as the tensors that training draws its batches from."""

import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor
from transformers import T5Tokenizer

from .captions import caption, decorated, fragment
from .drawing import pack
from .scenes import COLOURS, KINDS, LAYOUTS, PLACES, RELATIONS, SHAPES, SIZES, Scene
from .scenes import random_scene as any_scene

TOKENS = 48  # longest caption that is kept whole; undecorated ones stay under 40
CAPTIONS = 4  # whole captions of each scene, every fifth of them decorated
_CHUNK = 2000  # scenes that one process makes at a time
_UNSAID = -100  # a label that no caption of the scene tells

LABELS: dict[str, tuple[object, ...]] = {  # what can be read from a whole caption
    "kind": KINDS,
    "count": (1, *LAYOUTS),
    "background": tuple(COLOURS),
    "place": tuple(PLACES),
    "relation": tuple(RELATIONS),
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "second shape": SHAPES,
    "second colour": tuple(COLOURS),
    "second size": tuple(SIZES),
}


@dataclass(frozen=True)
class Corpus:
    """Scenes of one canvas.

    Attributes:
        canvas: width and height, px.
        packed: what `drawing.pack` makes, [scenes, 5, 7].
        whole: tokens of whole captions, 0 where there are none, [scenes, 4, 48], int16.
        fragments: tokens of a fragment, [scenes, 48], int16.
        labels: indices into each of `LABELS`, -100 where it is not said, [scenes, 11].
    """

    canvas: tuple[int, int]
    packed: Tensor
    whole: Tensor
    fragments: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.packed)

    def to(self, device: torch.device) -> "Corpus":
        """The same on a device."""
        tensors = (self.packed, self.whole, self.fragments, self.labels)
        return Corpus(self.canvas, *(tensor.to(device) for tensor in tensors))


def make(tokenizer: T5Tokenizer, count: int, canvas: tuple[int, int], held_out: bool) -> Corpus:
    """The first `count` scenes of a canvas: the same in every run and on every machine."""
    starts = range(0, count, _CHUNK)
    chunk = partial(_chunk, tokenizer, canvas, held_out, count)
    # Forked, and so before CUDA starts: importing the libraries again would take longer.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as workers:
        made = list(workers.map(chunk, starts))
    packed, whole, fragments, labels = (
        torch.from_numpy(np.concatenate(parts)) for parts in zip(*made, strict=True)
    )
    return Corpus(canvas, packed, whole, fragments, labels)


def scene(canvas: tuple[int, int], held_out: bool, index: int) -> Scene:
    """The scene behind an entry of a corpus."""
    return any_scene(random.Random(f"scene/{canvas}/{held_out}/{index}"), held_out, canvas=canvas)


def tokens(tokenizer: T5Tokenizer, texts: list[str]) -> Tensor:
    """Texts as padded tokens, [texts, 48], int16; longer ones are cut."""
    made = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS)
    return torch.from_numpy(np.array(made.input_ids, dtype=np.int16))


def _chunk(
    tokenizer: T5Tokenizer, canvas: tuple[int, int], held_out: bool, count: int, start: int
) -> tuple[np.ndarray, ...]:
    """Some scenes packed, the tokens of their whole captions and fragments, and their labels."""
    torch.set_num_threads(1)
    indices = range(start, min(start + _CHUNK, count))
    scenes = [scene(canvas, held_out, index) for index in indices]
    rng = random.Random(f"captions/{canvas}/{held_out}/{start}")
    whole, fragments = [], []
    for each in scenes:
        texts = [caption(each, rng) for _ in range(CAPTIONS)]
        whole += [decorated(text, rng) if rng.random() < 0.2 else text for text in texts]
        fragments.append(fragment(each, rng))
    return (
        pack(scenes).numpy(),
        tokens(tokenizer, whole).view(-1, CAPTIONS, TOKENS).numpy(),
        tokens(tokenizer, fragments).numpy(),
        np.array([labels_of(each) for each in scenes]),
    )


def labels_of(scene: Scene) -> list[int]:
    """The scene's index into each of `LABELS`."""
    first, *second = scene.things
    said: dict[str, object] = {
        "kind": scene.kind,
        "background": scene.background,
        "shape": first.shape,
        "colour": first.colour,
        "size": first.size,
    }
    if second:
        said |= {"relation": scene.relation, "second shape": second[0].shape}
        said |= {"second colour": second[0].colour, "second size": second[0].size}
    else:
        said |= {"count": scene.count}
    if scene.kind == "place":
        said |= {"place": scene.place}
    return [
        values.index(said[name]) if name in said else _UNSAID for name, values in LABELS.items()
    ]
