"""The VAE's attention over all positions of a map, exact at any size.

Keys and values are computed once, and kept on the device if they fit or else on the host, from
where they stream by in chunks while some positions ask: softmax is kept up to date with the running
maximum and sum (Milakov & Gimelshein 2018, arXiv 1805.02867), in float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowvram.pixels.feature_maps import Store
from lowvram.pixels.layers import AttentionPass
from lowvram.pixels.moments import Moments, normalise
from lowvram.pixels.room import Chunks
from lowvram.pixels.transfers import Transfers

Span = tuple[int, int]


def attend(
    one: AttentionPass,
    source: Tensor,
    affine: Tensor,
    cut: Chunks,
    store: Store,
    transfers: Transfers,
    advance: Callable[[int], None],
) -> Moments | None:
    """Change the map in place; its new moments if they are needed.

    Args:
        source: `[height, channels, width]`, on the host.
        affine: of the normalisation.
        advance: told the work of every strip.
    """
    attention, device = one.attention, transfers.device
    strips = _spans(one.source.height, cut.rows)
    keys, values = (_home(one, source, cut, store, device) for _ in range(2))
    for start, stop in strips:
        transfers.start(source[start:stop])
        positions = _normalised(transfers.take(), affine)
        asked = slice(start * one.source.width, stop * one.source.width)
        _put(keys[asked], attention.to_k(positions), transfers)
        _put(values[asked], attention.to_v(positions), transfers)
        del positions
    transfers.finish()
    moments = Moments(len(strips), one.source.channels, device) if one.measured else None
    for start, stop in strips:
        transfers.start(source[start:stop])
        strip = transfers.take()
        seen = _seen(attention.to_q(_normalised(strip, affine)), keys, values, cut, transfers)
        strip = _added(one, strip, attention.to_out[0](seen))
        del seen
        if moments is not None:
            moments.add(strip.transpose(0, 1))
        transfers.write(source[start:stop], strip)
        del strip
        advance(one.work // one.source.height * (stop - start))
    transfers.finish()
    if not cut.resident:
        store.free(keys)
        store.free(values)
    return moments


def _spans(count: int, size: int) -> list[Span]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _home(
    one: AttentionPass, source: Tensor, cut: Chunks, store: Store, device: torch.device
) -> Tensor:
    """Where keys or values stay, `[positions, channels]`."""
    shape = (one.tokens, one.source.channels)
    if cut.resident:
        return torch.empty(shape, dtype=source.dtype, device=device)
    return store.empty(shape, source.dtype)


def _normalised(strip: Tensor, affine: Tensor) -> Tensor:
    """`[rows, channels, width]` to normalised `[positions, channels]`."""
    rows, channels, width = strip.shape
    normed = strip.new_empty(rows, width, channels)
    normalise(strip.transpose(0, 1), affine, normed.permute(2, 0, 1), activate=False)
    return normed.view(-1, channels)


def _added(one: AttentionPass, strip: Tensor, seen: Tensor) -> Tensor:
    """The strip and what its positions saw, in new memory: on the CPU the strip is the map."""
    rows, channels, width = strip.shape
    added = torch.empty_like(strip)
    torch.add(strip, seen.view(rows, width, channels).transpose(1, 2), out=added)
    if one.attention.rescale_output_factor != 1:
        added.div_(one.attention.rescale_output_factor)
    return added


def _seen(query: Tensor, keys: Tensor, values: Tensor, cut: Chunks, transfers: Transfers) -> Tensor:
    """softmax(query x keys) x values, `[positions that ask, channels]`, rounded once."""
    if query.device.type == "cuda" and cut.resident and _is_fused(query, keys):
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return functional.scaled_dot_product_attention(
                query[None, None], keys[None, None], values[None, None]
            )[0, 0]
    dtype = query.dtype
    look = _Look(query.float() * query.shape[1] ** -0.5)
    del query
    streamed = not transfers.has(keys)
    coming = [
        home[start:stop] for start, stop in _spans(len(keys), cut.keys) for home in (keys, values)
    ]
    for index in range(-2, len(coming), 2):
        if streamed:
            for chunk in coming[index + 2 : index + 4]:
                transfers.start(chunk)
        if index >= 0:
            look.ask(transfers.take() if streamed else coming[index])
            look.add(transfers.take() if streamed else coming[index + 1])
    return look.result(dtype)


def _put(home: Tensor, computed: Tensor, transfers: Transfers) -> None:
    if transfers.has(home):
        home.copy_(computed)
    else:
        transfers.write(home, computed)


class _Look:
    """Softmax over keys that come in chunks, and the sum of the values that go with them.

    Args:
        query: scaled, float32.
    """

    def __init__(self, query: Tensor) -> None:
        self._query = query
        self._seen = torch.zeros_like(query)
        self._total = query.new_zeros(len(query), 1)
        self._top = torch.full_like(self._total, -torch.inf)
        self._scores: Tensor | None = None

    def ask(self, keys: Tensor) -> None:
        """Exponentials of the scores; what was summed so far is brought down to their maximum."""
        scores = self._query @ keys.float().T
        top = torch.maximum(self._top, scores.amax(1, keepdim=True))
        factor = (self._top - top).exp_()
        self._top = top
        self._scores = scores.sub_(top).exp_()
        self._total.mul_(factor).add_(scores.sum(1, keepdim=True))
        self._seen.mul_(factor)

    def add(self, values: Tensor) -> None:
        """The values of the keys that were asked."""
        assert self._scores is not None
        self._seen.addmm_(self._scores, values.float())
        self._scores = None

    def result(self, dtype: torch.dtype) -> Tensor:
        """`[positions that ask, channels]`, rounded once."""
        return self._seen.div_(self._total).to(dtype)


def _is_fused(query: Tensor, keys: Tensor) -> bool:
    """Whether CUDA has a kernel for these that holds no matrix of scores."""
    one, whole = query[None, None], keys[None, None]
    asked = torch.backends.cuda.SDPAParams(one, whole, whole, None, 0.0, False, False)
    return torch.backends.cuda.can_use_efficient_attention(asked)
