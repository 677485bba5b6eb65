"""The text encoder's stage: it learns alone to name every attribute of a caption."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5EncoderModel, T5Tokenizer

from . import networks
from .corpus import CAPTIONS, LABELS, Corpus
from .sampling import embed
from .training import Figures, Log, Plan, device, fit, workers


def train_text(
    plan: Plan, folder: Path, log: Log, tokenizer: T5Tokenizer, seen: Corpus, unseen: Corpus
) -> T5EncoderModel:
    """Teach the text encoder alone to name every attribute of a caption."""
    encoder = networks.make_text_encoder(tokenizer).to(device())
    readers = Readers(encoder.config.d_model).to(device())
    parts = nn.ModuleDict({"encoder": encoder, "readers": readers})

    def loss_at(progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.randint(len(seen), (plan.batch // workers(),), device=device())
        texts = seen.whole[rows, torch.randint_like(rows, CAPTIONS)]
        guesses = readers(*embed(encoder, texts))
        losses = [
            F.cross_entropy(guess, truth, reduction="sum") / len(rows)
            for guess, truth in zip(guesses, seen.labels[rows].unbind(1), strict=True)
        ]
        return torch.stack(losses).sum(), {}

    @torch.no_grad()
    def watch(parts: nn.ModuleDict, step: int) -> Figures:
        guesses = parts["readers"](*embed(parts["encoder"], unseen.whole[:, 0]))
        right = {}
        for name, guess, truth in zip(LABELS, guesses, unseen.labels.unbind(1), strict=True):
            said = truth >= 0
            right[name] = (guess.argmax(-1)[said] == truth[said]).float().mean().item()
        return right

    fit(plan, parts, loss_at, watch, folder, log)
    with torch.no_grad():
        embeds, mask = embed(encoder, unseen.whole[:, 0])
        encoder.encoder.final_layer_norm.weight /= embeds[mask == 1].std()
    return encoder


class Readers(nn.Module):
    """Throw-away heads that read each attribute from the text embeddings.

    One learned query per attribute picks tokens, so a token has to carry the role of its colour
    (of the first thing, of the second, of the background) and not only its name.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(LABELS), width) * width**-0.5)
        self.heads = nn.ModuleList(nn.Linear(width, len(values)) for values in LABELS.values())

    def forward(self, embeds: Tensor, mask: Tensor) -> list[Tensor]:
        """`embeds` [batch, tokens, width], `mask` [batch, tokens] -> logits per attribute."""
        scores = torch.einsum("aw,btw->bat", self.queries, embeds)
        weights = scores.masked_fill(mask[:, None] == 0, -1e9).softmax(-1)
        pooled = weights @ embeds
        return [head(pooled[:, index]) for index, head in enumerate(self.heads)]
