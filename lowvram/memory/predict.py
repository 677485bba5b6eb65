"""Foretells peaks: the real modules run on tensors without storage, and live bytes are counted.

Needs configurations only, no weights and no GPU. Against the real CPU allocator the count is exact;
on CUDA a convolution adds the workspace that cuDNN takes, which is not counted here.
"""

from collections.abc import Callable

import torch
from torch import nn

from lowvram.memory.count import LiveBytes, fake_device

# What torch allocates for cuBLAS at the first matrix product: 32 MiB on Hopper, 8 elsewhere
# (`CUDABlas.cpp`, default of CUBLAS_WORKSPACE_CONFIG). Not yet measured here.
CUBLAS_BYTES = 32 << 20


def peak_activations(
    build: Callable[[], nn.Module], work: Callable[[nn.Module, torch.device], object]
) -> int:
    """Bytes that a piece of work holds at its peak besides the weights.

    Args:
        build: makes the network, on the default device.
        work: calls it with tensors that it makes on the device given.
    """
    with torch.inference_mode(False), fake_device() as device:
        with device:  # torch.tensor([]) fails on a fake device in inference mode
            model = build()
        with torch.inference_mode(), LiveBytes(device.type) as live:
            work(model, device)
    return live.peak


def without_storage(build: Callable[[], nn.Module]) -> nn.Module:
    """The network for its shapes only."""
    with torch.device("meta"):
        return build()
