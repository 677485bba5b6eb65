"""What a device really computes: small products of each kind, compared with float32 on the CPU.

A library that loads and answers nonsense is found here, before a picture is.
"""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowvram.devices import choose_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Relative errors, of norms. Measured on a CPU: 0.002 in bfloat16, 0.005 in 8 bits, 0.09 in nf4.
BOUNDS = {"bfloat16": 0.01, "int8": 0.03, "nf4": 0.15}

_ROWS, _INPUTS, _OUTPUTS = 32, 256, 128


@dataclass(frozen=True)
class Outcome:
    """How far a product was from the one in float32, and how far it may be."""

    error: float
    bound: float

    @property
    def works(self) -> bool:
        """False for NaN too."""
        return self.error <= self.bound


def check_bfloat16(device: "torch.device") -> Outcome:
    """A matrix product in bfloat16 on the device."""
    import torch

    inputs, weight, _ = _problem()
    a, b = inputs.bfloat16(), weight.t().bfloat16()
    got = torch.mm(a.to(device), b.to(device))
    return _compare(got, a.float() @ b.float(), "bfloat16")


def check_quantized(bits: int, device: "torch.device") -> Outcome:
    """A linear layer of bitsandbytes on the device: int8 with an outlier column, or nf4.

    The layer is made anew: nf4 weights that were used on a CPU are spoilt for anything else.

    Args:
        bits: 8 or 4.
    """
    import torch
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    inputs, weight, bias = _problem()
    dtype, _ = choose_dtype("auto", "bfloat16", device)  # as the text encoder computes
    layer: Any
    if bits == 8:
        layer = Linear8bitLt(_INPUTS, _OUTPUTS, has_fp16_weights=False, threshold=6.0)
    else:
        layer = Linear4bit(_INPUTS, _OUTPUTS, compute_dtype=dtype, quant_type="nf4")
    layer.load_state_dict({"weight": weight, "bias": bias})
    layer = layer.to(dtype).to(device)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it casts, which it is meant to
        got = layer(inputs.to(device, dtype))
    expected = torch.nn.functional.linear(inputs, weight, bias)
    return _compare(got, expected, "int8" if bits == 8 else "nf4")


def pins_memory(device: "torch.device") -> bool | None:
    """Whether host memory can be pinned for the device; None where both are one memory."""
    import torch

    if device.type in ("cpu", "mps"):
        return None
    return torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True).is_pinned()


def _problem() -> "tuple[Tensor, Tensor, Tensor]":
    """Inputs with an outlier column, as T5 has them, a weight and a bias; the same each time."""
    import torch

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(_ROWS, _INPUTS, generator=generator)
    inputs[:, 7] *= 20
    weight = torch.randn(_OUTPUTS, _INPUTS, generator=generator) / 16
    return inputs, weight, torch.randn(_OUTPUTS, generator=generator)


def _compare(got: "Tensor", expected: "Tensor", name: str) -> Outcome:
    error = (got.cpu().float() - expected).norm() / expected.norm()
    return Outcome(float(error), BOUNDS[name])
