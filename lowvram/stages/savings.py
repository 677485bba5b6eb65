"""Ways to hold less in a denoising step, each exact up to rounding; the budget chooses among them.

Counted for PixArt XL/2 in fp16 at 1024 px (benchmarks/results/savings.json): 228 MB as diffusers
computes it, 115 MB with the guidance branches in turn, 70 MB with the feed-forward in 4 chunks
besides; 16 chunks give 2 MB more there and nothing at 2048 px. Keeping the caption projection and
the keys and values of the text between steps was left out: they are under 0.4 % of a step's
multiplications with real tokens, and 3.7 % at most, at 512 px with 300.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowvram.families.family import guide

if TYPE_CHECKING:
    from torch import Tensor, nn


EMBEDS, MASK = "prompt_embeds", "prompt_attention_mask"  # by token; as `Family.encode` names them


@dataclass(frozen=True)
class Savings:
    """What a step does to hold less.

    Attributes:
        branches: of guidance, "together" in one batch or "in turn".
        feed_forward_chunks: pieces, along the tokens, in which feed-forward layers are computed.
        text: "padded" as it was encoded, or "real": masked tokens at the end are dropped.
    """

    branches: str = "together"
    feed_forward_chunks: int = 1
    text: str = "padded"

    def settings(self) -> dict[str, Any]:
        """What an artifact says of it."""
        return dict(vars(self))

    def __str__(self) -> str:
        said = [f"guidance branches {self.branches}"]
        if self.feed_forward_chunks > 1:
            said.append(f"feed-forward in {self.feed_forward_chunks} chunks")
        return ", ".join(said)


# From what costs nothing to what costs most time: small matrix products fill a GPU badly.
LADDER = (
    Savings(),
    Savings("in turn", text="real"),
    Savings("in turn", 4, "real"),
)
# Without guidance there is one branch.
UNGUIDED = (Savings(), Savings(feed_forward_chunks=4))


def chunk_feed_forward(model: "nn.Module", chunks: int) -> None:
    """Let every feed-forward layer of diffusers compute its tokens in so many pieces.

    Tokens do not meet there, so that each piece computes what it would in the whole.
    """
    from diffusers.models.attention import FeedForward

    if chunks > 1:
        for module in model.modules():
            if isinstance(module, FeedForward):
                module.forward = _in_chunks(module.forward, chunks)


def _in_chunks(forward: "Callable[..., Tensor]", chunks: int) -> "Callable[..., Tensor]":
    def chunked(tokens: "Tensor", *args: Any, **kwargs: Any) -> "Tensor":
        size = -(-tokens.shape[1] // chunks)
        out: Tensor | None = None
        for start in range(0, tokens.shape[1], size):
            part = forward(tokens[:, start : start + size], *args, **kwargs)
            if out is None:  # filled piece by piece: a list of pieces would hold them twice
                out = part.new_empty((part.shape[0], tokens.shape[1], *part.shape[2:]))
            out[:, start : start + size] = part
        assert out is not None
        return out

    return chunked


def real_tokens(text: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """A text's tensors, those by token `[tokens, …]` up to the last that is not masked."""
    mask = text[MASK]
    count = max(1, int(mask.nonzero().max()) + 1 if mask.any() else 1)
    return {
        name: tensor[:count] if name in (EMBEDS, MASK) else tensor for name, tensor in text.items()
    }


def guided(
    predict: "Callable[[int], Tensor]",
    each: "Callable[[Sequence[Callable[[], Tensor]]], list[Tensor]]",
    guidance_scale: float,
) -> "Tensor":
    """Guidance with the branches in turn.

    Args:
        predict: the prediction of a branch: 0 for the negative text, 1 for the prompt.
        each: carries out calls of the network.
    """
    without, towards = each([lambda: predict(0), lambda: predict(1)])
    return guide(without, towards, guidance_scale)
