"""GroupNorm from global moments: measured strip by strip, merged, applied to any strip.

Each strip's moments are taken per channel in float32 on the device. They are merged over strips and
channels in float64 on the host (Chan, Golub & LeVeque 1983, eq. 2.1, for many parts at once), which
also serves devices without float64. Strips are `[channels, rows, width]`, in any memory layout.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Moments:
    """The moments of one map, filled while the map is written."""

    def __init__(self, strips: int, channels: int, device: torch.device) -> None:
        # Mean and sum of squared deviations of each strip; read once, after the last strip.
        self._table = torch.empty(strips, 2, channels, device=device)
        self._counts: list[int] = []

    def add(self, strip: Tensor) -> None:
        """Measure the next strip; it makes one float32 copy of it."""
        mean, squares = self._table[len(self._counts)]
        self._counts.append(strip.shape[1] * strip.shape[2])
        if strip.dtype == torch.float32:
            mean.copy_(strip.mean((1, 2)))
            centred = strip - mean[:, None, None]
        else:
            centred = strip.float()
            mean.copy_(centred.mean((1, 2)))
            centred.sub_(mean[:, None, None])
        squares.copy_(centred.square_().sum((1, 2)))

    def affine(self, norm: nn.GroupNorm) -> Tensor:
        """`[2, channels, 1, 1]`, float32, on the device: GroupNorm is x * first + second."""
        means, squares = self._table.cpu().double().unbind(1)
        counts = torch.tensor(self._counts, dtype=torch.float64)[:, None]
        groups, channels = norm.num_groups, means.shape[1]
        means, squares = (t.view(-1, groups, channels // groups) for t in (means, squares))
        weights = counts[:, :, None].expand_as(means)
        total = weights.sum((0, 2))
        mean = (means * weights).sum((0, 2)) / total
        between = ((means - mean[:, None]).square() * weights).sum((0, 2))
        variance = (squares.sum((0, 2)) + between) / total
        per_group = torch.stack([(variance + norm.eps).rsqrt(), mean])
        deviation, mean = per_group.repeat_interleave(channels // groups, dim=1)
        scale = norm.weight.cpu().double() * deviation
        shift = norm.bias.cpu().double() - mean * scale
        return torch.stack([scale, shift]).float()[:, :, None, None].to(self._table.device)


def normalise(strip: Tensor, affine: Tensor, out: Tensor, activate: bool) -> None:
    """GroupNorm (and SiLU) of a strip into `out`, computed in float32 and rounded once."""
    scale, shift = affine
    exact = out
    if out.dtype == torch.float32:
        torch.addcmul(shift, strip, scale, out=out)
    else:
        exact = strip.float()
        torch.addcmul(shift, exact, scale, out=exact)
    if activate:
        functional.silu(exact, inplace=True)
    if exact is not out:
        out.copy_(exact)
