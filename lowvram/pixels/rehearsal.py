"""The strips of a picture without computing them: in which order a GPU's memory comes and goes.

What the caching allocator reserves depends on that order, and is up to 1.7 times what `room.py`
counts. Run on tensors without storage: of passes that are alike one, and of that the first strip,
two more and the last.
"""

from dataclasses import replace
from typing import Any

import torch

from lowvram.pixels.layers import ConvPass, Shape, decoder_passes, encoder_passes
from lowvram.pixels.passes import convolve
from lowvram.pixels.room import Costs, conv_rows
from lowvram.pixels.strips import Direction
from lowvram.pixels.transfers import RehearsedTransfers


def rehearse(
    vae: Any, latents: tuple[int, int], room_bytes: int, direction: Direction, device: torch.device
) -> None:
    """Allocate as strips on CUDA do, but for attention: `room.py` counts more than it takes.

    Args:
        vae: on the device, which may be one of fake tensors.
        latents: height and width of the picture's.
        room_bytes: what may be held beside the weights, as for `StripDecode`.
    """
    dtype = next(vae.parameters()).dtype
    costs = Costs(dtype.itemsize, "cuda")
    if direction == "decode":
        passes = decoder_passes(vae, *latents)
    else:
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        passes = encoder_passes(vae, *(scale * side for side in latents))
    done: set[tuple[object, ...]] = set()
    with RehearsedTransfers(device) as transfers:
        for one in passes:
            alike: tuple[object, ...] = (one.source, one.target)
            if isinstance(one, ConvPass):
                alike += (
                    one.resample,
                    one.norm is None,
                    one.adds,
                    one.shortcut is None,
                    one.measured,
                )
            if not isinstance(one, ConvPass) or alike in done:
                continue
            done.add(alike)
            rows = conv_rows(one, room_bytes, costs)
            short = _shortened(one, rows)
            channels = one.target.channels if one.shortcut is None else one.shortcut.in_channels
            source, target, kept = (
                torch.empty(shape.height, shape.channels, shape.width, dtype=dtype)
                for shape in (short.source, short.target, replace(short.target, channels=channels))
            )
            affine = None
            if one.norm is not None:
                affine = torch.empty(2, one.source.channels, 1, 1, device=device)
            convolve(
                short, source, kept if one.adds else None, target, affine, rows, transfers, _no_work
            )


def _shortened(one: ConvPass, rows: int) -> ConvPass:
    """Of a map that is cut into four strips, the last as high as that of the whole map."""
    height = one.target.height
    if height <= 4 * rows:
        return one
    height = 3 * rows + (height % rows or rows)
    above = {"same": height, "up": height // 2, "down": 2 * height}[one.resample]
    return replace(one, source=Shape(above, one.source.channels, one.source.width))


def _no_work(work: int) -> None:
    """Nobody counts."""
