"""How many bytes a pass holds on the device, and the strips that keep them under a room.

Counted are tensors, as `passes.py` and `attention.py` make them: every formula is the largest sum
that lives at once, for strips of so many rows. A test counts the real ones and holds this.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowvram.errors import RequestError
from lowvram.pixels.layers import AttentionPass, ConvPass, Pass

# On the CPU a strip should stay in the cache between the operations on it: an SDXL VAE at 256 px in
# float32 took 0.85 of the whole decode's time in strips of 4 MB, 0.86 of 8 MB, 1.09 of 16 MB (two
# cores, 32 MB of L3, one quiet round; other rounds were disturbed).
_CACHE_BYTES = 4 << 20
_MIN_ROWS = 8  # below, the two rows of halo are more than a fifth of what is read
_COMFORTABLE_ROWS = 16
_CHUNK = 1024  # positions of attention that are worth computing at once, in either direction
_MOST_CHUNK = 8192  # on a device; the scores are then 268 MB
_FLOAT = 4  # bytes of float32, in which norms, moments and softmax are computed


@dataclass(frozen=True)
class Costs:
    """What the bytes depend on beside the shapes.

    Attributes:
        itemsize: bytes of a number of the VAE's dtype.
        device_type: "cpu": strips that are read are views of maps and cost nothing; "cuda": copies
            run beside the computation, so one strip more is held in each direction, and the
            libraries have their own workspace; others: plain copies.
    """

    itemsize: int
    device_type: str

    @property
    def upcast(self) -> int:
        """Bytes of a number that float32 work on the dtype takes besides: 0 or 4."""
        return 0 if self.itemsize >= _FLOAT else _FLOAT

    @property
    def copied(self) -> int:
        """Bytes of a number of a strip that was read."""
        return 0 if self.device_type == "cpu" else self.itemsize


@dataclass(frozen=True)
class Chunks:
    """How attention is cut.

    Attributes:
        rows: of the map, whose positions ask at a time.
        keys: positions that are asked at a time.
        resident: all keys and values stay on the device.
    """

    rows: int
    keys: int
    resident: bool


def conv_rows(one: ConvPass, room: int, costs: Costs) -> int:
    """The rows of a strip: as many as are fast and fit.

    Raises:
        RequestError: not even the least strip fits.
    """
    for rows in _row_choices(one, costs):
        if conv_bytes(one, rows, costs) <= room:
            return rows
    raise _too_small(room, _least_conv(one, costs))


def chunks(one: AttentionPass, room: int, costs: Costs) -> Chunks:
    """How to cut attention so that it is fast and fits.

    Raises:
        RequestError: not even one row at a time fits.
    """
    most = _most_chunk(costs)
    resident = [cut for cut in _cuts(one, True, most) if cut.keys >= min(one.tokens, _CHUNK // 4)]
    for cut in (resident if costs.device_type != "cpu" else []) + _cuts(one, False, most):
        if attention_bytes(one, cut, costs) <= room:
            return cut
    raise _too_small(room, _least_attention(one, costs))


def least(passes: Sequence[Pass], costs: Costs) -> int:
    """Bytes without which some pass cannot be done."""
    return max(
        _least_conv(one, costs) if isinstance(one, ConvPass) else _least_attention(one, costs)
        for one in passes
    )


def used(passes: Sequence[Pass], room: int, costs: Costs) -> int:
    """Bytes that passes take of a room: what strips gain nothing from is left.

    Raises:
        RequestError: some pass cannot be done in it.
    """
    return max(
        conv_bytes(one, conv_rows(one, room, costs), costs)
        if isinstance(one, ConvPass)
        else attention_bytes(one, chunks(one, room, costs), costs)
        for one in passes
    )


def comfortable(passes: Sequence[Pass], costs: Costs) -> int:
    """Bytes beyond which there is little to gain: strips of 16 rows, keys and values resident."""
    return max(_comfortable(one, costs) for one in passes)


def maps_bytes(passes: Sequence[Pass], itemsize: int) -> int:
    """Bytes of the maps that live at once on the host, at most."""
    most = kept = 0
    for one in passes:
        now = one.source.size + kept
        if isinstance(one, AttentionPass):
            now += 2 * one.source.size
        elif not one.adds or one.shortcut is not None:
            now += one.target.size
        most = max(most, now)
        kept = one.source.size if isinstance(one, ConvPass) and one.keeps else 0
    return most * itemsize


def conv_bytes(one: ConvPass, rows: int, costs: Costs) -> int:
    """Bytes of a convolution in strips of so many rows."""
    source, target = one.source, one.target
    line, out_line = source.width * source.channels, target.width * target.channels
    read_rows, held_rows, held_width = {
        "same": (rows + 2 * one.halo, rows + 2 * one.halo, source.width),
        "up": (rows // 2 + 2, rows + 2, 2 * source.width),
        "down": (2 * rows + 1, 2 * rows + 1, source.width + 1),
    }[one.resample]
    read_rows = min(read_rows, source.height)
    read = read_rows * line * costs.copied
    work = read_rows * line * costs.upcast if one.norm is not None else 0
    held = held_rows * held_width * source.channels * costs.itemsize
    written = rows * out_line * costs.itemsize
    added = shortcut = 0
    if one.adds:
        channels = target.channels
        if one.shortcut is not None:
            channels, shortcut = one.shortcut.in_channels, written
        added = rows * target.width * channels * costs.copied
    measured = rows * out_line * _FLOAT if one.measured else 0
    # Copies that run beside: this strip's addend from the start, the next strip, the one before.
    early = added if costs.device_type == "cuda" else 0
    ahead = read + added + written if costs.device_type == "cuda" else 0
    phases = [
        read + work + held + early,
        held + written + _workspace(one, held, written, costs) + early,
        written + added + shortcut,
        written + measured,
        written + rows * out_line * costs.copied,  # made one block, to be copied
    ]
    norm = 2 * source.channels * _FLOAT if one.norm is not None else 0
    small = norm + _small(one, _ceil(target.height, rows))
    return max(phases) + ahead + small + _matmul_workspace(costs)


def attention_bytes(one: AttentionPass, cut: Chunks, costs: Costs) -> int:
    """Bytes of attention, cut so."""
    width, rows = one.source.channels, min(cut.rows, one.source.height)
    tokens, keys = rows * one.source.width, min(cut.keys, one.tokens)
    item, strip = costs.itemsize, tokens * width
    read, exact, work = strip * costs.copied, strip * _FLOAT, strip * costs.upcast
    # Keys or values of a chunk: a copy where they are not resident, and float32 where they are not.
    chunk = 0 if cut.resident else keys * width * costs.copied
    phases = [
        read + work + strip * item,
        read + 2 * strip * item + exact,
        read + 2 * exact + tokens * keys * _FLOAT + chunk + keys * width * costs.upcast,
        read + 2 * exact + strip * item,
        read + 3 * strip * item,
        exact + 2 * strip * item,
    ]
    constants = 2 * width * _FLOAT + _small(one, _ceil(one.source.height, rows))
    constants += 16 * tokens * _FLOAT  # running maxima, sums and factors
    if cut.resident:
        constants += 2 * one.source.size * item
    if costs.device_type == "cuda":
        constants += strip * item + 3 * chunk
    return max(phases) + constants + _matmul_workspace(costs)


def _least_conv(one: ConvPass, costs: Costs) -> int:
    """Bytes of the convolution in the strips that take least."""
    return min(conv_bytes(one, rows, costs) for rows in _row_choices(one, costs))


def _least_attention(one: AttentionPass, costs: Costs) -> int:
    return min(attention_bytes(one, cut, costs) for cut in _cuts(one, False, _CHUNK))


def _comfortable(one: Pass, costs: Costs) -> int:
    if isinstance(one, ConvPass):
        rows = _row_choices(one, costs)[0]
        if costs.device_type != "cpu":  # there the best strips are small anyway
            rows = min(_COMFORTABLE_ROWS, rows)
        return conv_bytes(one, rows, costs)
    most = _CHUNK
    while most < min(one.tokens // 16, _most_chunk(costs)):  # more to ask: larger steps
        most *= 2
    return attention_bytes(one, _cuts(one, costs.device_type != "cpu", most)[0], costs)


def _most_chunk(costs: Costs) -> int:
    return _CHUNK if costs.device_type == "cpu" else _MOST_CHUNK


def _cuts(one: AttentionPass, resident: bool, most: int) -> list[Chunks]:
    """Ways to cut attention, the best first: `most`, a power of two, and all smaller ones."""
    powers = (most >> n for n in range(most.bit_length()))
    sizes = [size for size in powers if size < 2 * one.tokens]
    return [Chunks(max(1, size // one.source.width), size, resident) for size in sizes]


def _row_choices(one: ConvPass, costs: Costs) -> range:
    """Heights of strips, the best first.

    Strips of an upsampled map are even: cut between the rows that it was made of.
    """
    step = 2 if one.resample == "up" else 1
    return range(_ceil(_most_rows(one, costs), step) * step, 0, -step)


def _most_rows(one: ConvPass, costs: Costs) -> int:
    """More rows than these are no faster.

    On the CPU what fits the cache; elsewhere eighths of the map, so that copies have something to
    hide behind.
    """
    height = one.target.height
    if costs.device_type == "cpu":
        line = max(one.source.size // one.source.height, one.target.size // height)
        rows = max(_MIN_ROWS, _CACHE_BYTES // (line * costs.itemsize))
    else:
        rows = max(_COMFORTABLE_ROWS, height // 8)
    return min(rows, height)


def _small(one: Pass, strips: int) -> int:
    """The table of moments, and their per-channel temporaries."""
    return (2 * strips + 8) * one.target.channels * _FLOAT


def _workspace(one: ConvPass, held: int, written: int, costs: Costs) -> int:
    """What cuDNN takes for a 3 x 3 convolution: see `memory/predict.py`."""
    if costs.device_type != "cuda" or not one.halo:
        return 0
    return held + written if costs.itemsize < _FLOAT else max(held, written)


def _matmul_workspace(costs: Costs) -> int:
    """What cuBLAS takes at its first use, and then keeps: torch's default for the GPU in use, and
    1 MiB for products with a bias.
    """
    if costs.device_type != "cuda":
        return 0
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
    return (33 << 20) if hopper else (9 << 20) + (128 << 10)


def _too_small(room: int, needed: int) -> RequestError:
    return RequestError(
        f"{room / 1e6:.1f} MB of device memory are too little for strips of this size: "
        f"{needed / 1e6:.1f} MB beside the weights is the least"
    )


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
