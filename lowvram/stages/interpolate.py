"""Interpolate: what lies between two texts, or between the noises of two seeds."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def slerp(one: "Tensor", other: "Tensor", at: float) -> "Tensor":
    """Spherical interpolation (Shoemake 1985): along the great circle, at even speed.

    Between two draws of standard normal noise it is again standard normal noise, which a straight
    line is not: half-way its variance would be half.

    Args:
        one, other: of one shape, float32.
        at: 0 for the one, bit for bit, to 1 for the other.
    """
    import torch

    start, end = one.double(), other.double()
    cosine = (start * end).sum() / (start.norm() * end.norm())
    angle = cosine.clamp(-1, 1).acos()
    if angle.sin() < 1e-6:  # the same, or opposite: there is no single circle
        return torch.lerp(start, end, at).to(one.dtype)
    between = ((1 - at) * angle).sin() * start + (at * angle).sin() * end
    return (between / angle.sin()).to(one.dtype)
