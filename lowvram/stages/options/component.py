"""What the options of every stage share: the network's shapes, and its need on a device."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lowvram.contents import weight_bytes
from lowvram.memory.plan import Need, Room
from lowvram.memory.predict import Trace, cuda_peaks, without_storage
from lowvram.repository import Model
from lowvram.weights.checkpoint import build, find_class

if TYPE_CHECKING:
    from torch import nn

# Parts of a room that may be lost between the blocks of a caching allocator: what streams tries to
# fill the room beside the least of them with which it fits.
LEFT_TO_ALLOCATOR = (0.0, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)


# By device: the libraries that compute, whose workspace is counted.
LIBRARIES = {"cuda": "cudnn", "cpu": "onednn"}


def shapes(model: Model, role: str, dtype: torch.dtype) -> "nn.Module":
    """The component without storage.

    Raises:
        ModelError: its configuration is missing.
    """
    component = model.get_family().component(role)
    config = model.config(role)
    return without_storage(lambda: build(find_class(component.class_name), config, dtype))


def need(
    held: Sequence[int],
    traced: Trace,
    device: torch.device,
    room: Room,
    *,
    host: int = 0,
    read: int = 0,
    transferred: int = 0,
    repeats: int = 1,
    overlaps: bool = False,
) -> Need:
    """What weights of these sizes and the work with them take on a device.

    Args:
        held: bytes of each tensor, or buffer, that weights have there.
        room: within which the allocator would have to work, if it can.
        host, read, transferred, overlaps: see `Need`; on a CPU nothing is transferred.
        repeats: how often the work is done.
    """
    flops = repeats * traced.flops
    if device.type != "cuda":
        allocated = sum(held) + traced.activations
        carried = 0 if device.type == "cpu" else transferred
        return Need(allocated, None, host, read, carried, flops, overlaps)
    found = room.bytes and cuda_peaks(held, traced, room.libraries, room.bytes)
    peaks = found or cuda_peaks(held, traced, room.libraries)
    assert peaks is not None  # without a cap it always succeeds
    return Need(peaks.allocated, peaks.reserved, host, read, transferred, flops, overlaps)


def copy_on_host(held: Sequence[int], device: torch.device) -> int:
    """Bytes of the network that `Whole` builds on the host before it goes to a device."""
    return 0 if device.type == "cpu" else sum(held)


def stored_bytes(model: Model, role: str, network: "nn.Module") -> int:
    """Bytes of a component's files; where they are not here yet, as float32, which is published."""
    return weight_bytes(model, role) or 4 * sum(
        parameter.numel() for parameter in network.parameters()
    )
