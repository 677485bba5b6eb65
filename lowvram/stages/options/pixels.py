"""The ways of the VAE: whole, in strips, or (to decode) in blended tiles."""

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from lowvram.memory.plan import Need, Option, Room, show
from lowvram.memory.predict import Trace, Work, sizes_of, trace
from lowvram.pixels.blended import BlendedDecode
from lowvram.pixels.feature_maps import InRam, OnDisk, Place, choose_place
from lowvram.pixels.rehearsal import rehearse
from lowvram.pixels.strategy import Pixels
from lowvram.pixels.strips import (
    Direction,
    StripDecode,
    comfortable_room,
    least_room,
    maps_bytes,
    used_room,
)
from lowvram.pixels.whole import WholeDecode
from lowvram.repository import Model
from lowvram.stages.options.component import (
    LEFT_TO_ALLOCATOR,
    LIBRARIES,
    copy_on_host,
    need,
    shapes,
    stored_bytes,
)

ENCODER_HALF = ("encoder", "quant_conv")  # of an AutoencoderKL: not needed to decode
DECODER_HALF = ("decoder", "post_quant_conv")  # and not to encode
_TILE = 512  # px, the side of a tile when decoding blended; halved where it does not fit
_LEAST_TILE = 64
_PASSES = 4  # largest maps that are written and read again, roughly
_OVERLAP = 0.25  # of a tile, diffusers' default
# Bytes of the largest filter's numbers that strips are foretold to hold besides: an H100 held 12.6
# MB (1024 px) and 9.7 (512 px) more than rehearsed in 256 MiB in float16, which is 14.2 MB so. Not
# known is of what: copies of filters, and blocks of weights that the allocator did not split.
_PER_FILTER_NUMBER = 6


def pixels_options(
    model: Model,
    asked: str,
    dtype: torch.dtype,
    device: torch.device,
    room: Room,
    shape: tuple[int, ...],
    batches: int = 1,
    folder: Path | None = None,
    direction: Direction = "decode",
) -> Iterator[Option[Pixels]]:
    """Fastest first.

    Args:
        asked: "auto" (what loses nothing), "whole", "strips", "blended", or "all".
        room: to which strips and tiles fit themselves.
        shape: of the latents of a batch.
        batches: how many there are.
        folder: for feature maps that have to lie on a disk; None for the system's temporary one,
            which on some systems is in RAM.
        direction: "decode", or "encode", which nothing blends.

    Raises:
        RequestError: not for this VAE.
    """
    vae = shapes(model, "vae", dtype)
    stored = stored_bytes(model, "vae", vae)
    for half in ENCODER_HALF if direction == "decode" else DECODER_HALF:
        setattr(vae, half, None)
    weights = sizes_of([*vae.parameters(), *vae.buffers()])
    whole: Option[Pixels] | None = None
    if asked in ("auto", "whole", "strips", "all"):
        work = (decode_once if direction == "decode" else encode_once)(shape, dtype)
        traced = trace(vae, work, library=LIBRARIES.get(device.type, ""))
        took = need(
            weights,
            traced,
            device,
            room,
            host=copy_on_host(weights, device),
            read=stored,
            transferred=sum(weights),
            repeats=batches,
        )
        whole = Option(WholeDecode(), "whole", took)
        if asked != "strips":
            yield whole
        if asked != "whole":
            yield from _strips(vae, dtype, device, room, shape, weights, took, folder, direction)
    if asked in ("blended", "all") and direction == "decode":
        yield from _blended(vae, dtype, device, room, shape, weights, batches, stored)


def decode_once(latents: tuple[int, ...], dtype: torch.dtype) -> Work:
    """A batch in one piece."""

    def work(vae: Any, device: torch.device) -> object:
        return vae.decode(torch.empty(latents, dtype=dtype, device=device), return_dict=False)[0]

    return work


def encode_once(latents: tuple[int, ...], dtype: torch.dtype) -> Work:
    """The pictures that latents of that shape are made of, in one piece."""

    def work(vae: Any, device: torch.device) -> object:
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        shape = (latents[0], vae.config.in_channels, latents[-2] * scale, latents[-1] * scale)
        pixels = torch.empty(shape, dtype=dtype, device=device)
        return vae.encode(pixels).latent_dist.parameters

    return work


def _strips(
    vae: Any,
    dtype: torch.dtype,
    device: torch.device,
    room: Room,
    shape: tuple[int, ...],
    weights: list[int],
    whole: Need,
    folder: Path | None,
    direction: Direction,
) -> Iterator[Option[Pixels]]:
    """As large as is fast, or as the room allows; then as small as can be."""
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = shape[-2] * scale, shape[-1] * scale
    of = (vae, height, width, dtype)
    least = least_room(*of, device.type, direction)
    most = max(least, comfortable_room(*of, device.type, direction))
    maps = maps_bytes(*of, direction)
    picture = prod(shape) // shape[1] * 3 * scale**2 * dtype.itemsize
    places: list[Place] = [choose_place(maps, device.type, folder)]
    if device.type == "cpu" and isinstance(places[0], InRam):
        places.append(OnDisk(folder))  # where the device is the host, maps take from the room
    host = 0 if device.type == "cpu" else maps
    rooms = [room.bytes - sum(weights) if room.bytes else most, least]
    for place in places:
        taken = 0
        in_room = picture + (maps if isinstance(place, InRam) else 0) if device.type == "cpu" else 0
        for own in dict.fromkeys(max(least, each - in_room) for each in rooms):
            peaks = None
            if device.type == "cuda":
                own, peaks = _fit_strips(vae, weights, device, room, shape, own, least, direction)
            strip = used_room(*of, device.type, own, direction)
            held = sum(weights) + strip
            if peaks is None:
                # oneDNN copies a strip into its own layout; of CUDA's libraries `room` knows.
                allocated = held + in_room + (strip if device.type == "cpu" else 0)
                reserved = None
            else:
                allocated = max(held, peaks.allocated)
                reserved = max(held, peaks.reserved or 0)
            if max(allocated, reserved or 0) == taken:  # the smallest strips take no less
                continue
            taken = max(allocated, reserved or 0)
            took = replace(whole, allocated=allocated, reserved=reserved)
            took = replace(took, host=host, transferred=2 * _PASSES * host)
            says = f"in {show(reserved or held)}, {place}"
            if shape[0] > 1:
                says += ", one picture at a time whatever the batch size"
            yield Option(StripDecode(own, place), "strips", took, says)


def _fit_strips(
    vae: Any,
    weights: list[int],
    device: torch.device,
    room: Room,
    shape: tuple[int, ...],
    own: int,
    least: int,
    direction: Direction,
) -> tuple[int, Need]:
    """Bytes for strips with which also what a GPU's allocator reserves is within the room, if some
    have; and what they take of it.
    """
    filters = [m.weight.numel() for m in vae.modules() if isinstance(m, torch.nn.Conv2d)]
    taken = [*weights, _PER_FILTER_NUMBER * max(filters)]
    for left in LEFT_TO_ALLOCATOR[::2]:
        fills = max(least, own - int(left * room.bytes))

        def strips(network: Any, fake: torch.device, fills: int = fills) -> None:
            rehearse(network, (shape[-2], shape[-1]), fills, direction, fake)

        traced = trace(vae, strips, library=LIBRARIES[device.type])
        found = need(taken, traced, device, room)
        if not room.bytes or room.holds(found) or fills == least:
            break
    return fills, found


def _blended(
    vae: Any,
    dtype: torch.dtype,
    device: torch.device,
    room: Room,
    shape: tuple[int, ...],
    weights: list[int],
    batches: int,
    stored: int,
) -> Iterator[Option[Pixels]]:
    """In tiles of 512 px, and smaller ones."""
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = shape[-2] * scale, shape[-1] * scale
    tile = _TILE
    while tile >= max(height, width) and tile > 2 * scale:
        tile //= 2
    while tile >= min(_LEAST_TILE, max(height, width) // 2):
        cells = tile // scale
        cut = (shape[0], shape[1], min(cells, shape[-2]), min(cells, shape[-1]))
        traced = trace(vae, decode_once(cut, dtype), library=LIBRARIES.get(device.type, ""))
        starts = range(0, shape[-2], cells - cells // 4), range(0, shape[-1], cells - cells // 4)
        sides = [
            sum(min(cells, length - at) for at in side)
            for side, length in zip(starts, shape[-2:], strict=True)
        ]
        number = prod(map(len, starts))
        bytes_per_cell = shape[0] * 3 * scale**2 * dtype.itemsize
        # diffusers keeps every tile until the last, then joins them to rows, and those
        tiles, picture = prod(sides) * bytes_per_cell, prod(shape[-2:]) * bytes_per_cell
        joined = Trace(
            tiles + max(traced.activations, 2 * picture),
            0,
            traced.flops * number,
            (
                *((-1000 - each, tiles // number) for each in range(number)),
                *traced.events,
                (-998, picture),
                (-999, picture),
            ),
        )
        took = need(
            weights,
            joined,
            device,
            room,
            host=copy_on_host(weights, device),
            read=stored,
            transferred=sum(weights),
            repeats=batches,
        )
        says = f"tiles of {tile} px, not the same pixels as whole"
        yield Option(BlendedDecode(tile, _OVERLAP), "blended", took, says, lossy=True)
        tile //= 2
