"""Runs the passes of a VAE in strips of rows: every map is read once and written once.

A strip is read with its halo, normalised with the moments of the whole map, convolved, added to,
measured and written. So each number is computed once, from the same numbers as in the whole
decode: only the order of some sums differs.
"""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional

from lowvram.pixels.attention import Span, attend
from lowvram.pixels.feature_maps import Store
from lowvram.pixels.layers import AttentionPass, ConvPass, Pass
from lowvram.pixels.moments import Moments, normalise
from lowvram.pixels.room import Costs, chunks, conv_rows
from lowvram.pixels.transfers import Transfers

Advance = Callable[[int], None]


def run_passes(
    passes: Sequence[Pass],
    source: Tensor,
    room_bytes: int,
    store: Store,
    transfers: Transfers,
    advance: Advance,
) -> Tensor:
    """The last map, lent from the store.

    Args:
        source: the first map, `[height, channels, width]`, lent from the store; it is given back.
        room_bytes: what may be held on the device beside the weights.
        advance: told the work of every strip, in multiplications.

    Raises:
        RequestError: the room is too small for any strip of some pass.
    """
    costs = Costs(source.element_size(), transfers.device.type)
    kept: Tensor | None = None
    moments: Moments | None = None
    for one in passes:
        affine = moments.affine(one.norm) if moments is not None and one.norm is not None else None
        moments = None  # its table goes before the next is made
        if isinstance(one, AttentionPass):
            assert affine is not None
            cut = chunks(one, room_bytes, costs)
            moments = attend(one, source, affine, cut, store, transfers, advance)
            continue
        rows = conv_rows(one, room_bytes, costs)
        shape = one.target
        in_place = kept if one.shortcut is None and one.adds else None
        target = in_place
        if target is None:
            target = store.empty((shape.height, shape.channels, shape.width), source.dtype)
        moments = convolve(one, source, kept, target, affine, rows, transfers, advance)
        if one.adds and kept is not None:
            if in_place is None:
                store.free(kept)
            kept = None
        if one.keeps:
            kept = source
        else:
            store.free(source)
        source = target
    return source


def convolve(
    one: ConvPass,
    source: Tensor,
    kept: Tensor | None,
    target: Tensor,
    affine: Tensor | None,
    rows: int,
    transfers: Transfers,
    advance: Advance,
) -> Moments | None:
    """Fill the target from the source, `rows` of it at a time; its moments if they are needed.

    Args:
        kept: what is added, if the pass adds; may be the target.
        affine: of the normalisation, if the pass normalises.
    """
    height = one.target.height
    spans = [(start, min(start + rows, height)) for start in range(0, height, rows)]
    moments = None
    if one.measured:
        moments = Moments(len(spans), one.target.channels, transfers.device)

    def start(span: Span) -> None:
        transfers.start(source[slice(*_rows_read(one, span))])
        if one.adds and kept is not None:
            transfers.start(kept[slice(*span)])

    start(spans[0])
    for index, span in enumerate(spans):
        if index + 1 < len(spans):
            start(spans[index + 1])
        padded = _padded(one, transfers.take(), span, affine)
        conv, sides = one.conv, 0 if one.resample == "down" else one.halo
        computed = functional.conv2d(padded[None], conv.weight, conv.bias, conv.stride, (0, sides))
        computed = computed[0]
        del padded
        if one.adds:
            _add(one, computed, transfers.take())
        if moments is not None:
            moments.add(computed)
        transfers.write(target[slice(*span)], computed.transpose(0, 1))
        del computed
        advance(one.work // height * (span[1] - span[0]))
    transfers.finish()
    return moments


def _add(one: ConvPass, computed: Tensor, added: Tensor) -> None:
    """End a residual branch, rounding where `ResnetBlock2D` rounds.

    Args:
        computed: `[channels, rows, width]`.
        added: `[rows, channels, width]`.
    """
    if one.shortcut is not None:  # 1 x 1: each row is a picture of its own
        rows = added[:, :, None]
        added = functional.conv2d(rows, one.shortcut.weight, one.shortcut.bias)[:, :, 0]
    computed.add_(added.transpose(0, 1))
    if one.divisor != 1:
        computed.div_(one.divisor)


def _rows_read(one: ConvPass, span: Span) -> Span:
    """The rows of the source that some rows of the target need."""
    start, stop = span
    if one.resample == "down":
        return 2 * start, min(2 * stop + 1, one.source.height)
    if one.resample == "up":
        return max(start // 2 - 1, 0), min(stop // 2 + 1, one.source.height)
    return max(start - one.halo, 0), min(stop + one.halo, one.source.height)


def _padded(one: ConvPass, strip: Tensor, span: Span, affine: Tensor | None) -> Tensor:
    """What is convolved, `[channels, rows, width]`: normalised or resampled, with zeros beyond the
    picture above and below.
    """
    strip = strip.transpose(0, 1)
    channels, rows, width = strip.shape
    height = span[1] - span[0]
    if one.resample == "down":
        padded = strip.new_empty(channels, 2 * height + 1, width + 1)
        padded[:, rows:].zero_()
        padded[:, :rows, width:].zero_()
        padded[:, :rows, :width].copy_(strip)
        return padded
    top = one.halo if span[0] == 0 else 0
    bottom = one.halo if span[1] == one.target.height else 0
    doubled = 2 if one.resample == "up" else 1
    padded = strip.new_empty(channels, height + 2 * one.halo, doubled * width)
    padded[:, :top].zero_()
    padded[:, padded.shape[1] - bottom :].zero_()
    inner = padded[:, top : padded.shape[1] - bottom]
    if doubled == 2:
        # An even row begins a pair; a strip within the picture begins with the end of one.
        begins, ends = inner[:, 0 if top else 1 :: 2], inner[:, 1 if top else 0 :: 2]
        for column in (0, 1):
            begins[:, :, column::2].copy_(strip[:, rows - begins.shape[1] :])
            ends[:, :, column::2].copy_(strip[:, : ends.shape[1]])
    elif affine is None:
        inner.copy_(strip)
    else:
        normalise(strip, affine, inner, activate=True)
    return padded
