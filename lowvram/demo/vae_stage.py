"""The VAE's stage: it learns on crops, then on whole pictures; then its latents are whitened."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from . import networks
from .corpus import Corpus
from .drawing import paint
from .pictures import decibels, from_tensor, sheet
from .training import Figures, Log, Plan, device, fit, workers

_CROP = 64  # px


def train_vae(
    plan: Plan, folder: Path, log: Log, seen: list[Corpus], unseen: list[Corpus]
) -> AutoencoderKL:
    """Train the autoencoder on crops, then on whole pictures, then whiten its latents."""
    vae = networks.make_vae().to(device())

    def loss_at(progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        share = plan.batch // workers()
        some = seen[int(torch.randint(len(seen), ()))]
        if progress < 0.8:
            pixels = _crops(some, share)
        else:
            rows = torch.randint(len(some), (max(share // 4, 1),), device=device())
            pixels = paint(some.packed[rows], *some.canvas)
        posterior = vae.encode(pixels).latent_dist
        error = vae.decode(posterior.sample()).sample - pixels
        l1, mse = error.abs().mean(), error.square().mean()
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return l1 + 2 * mse + edges + 1e-4 * kl, {"l1": l1.detach(), "kl": kl.detach()}

    @torch.no_grad()
    def watch(parts: nn.ModuleDict, step: int) -> Figures:
        averaged: Any = parts["vae"]
        figures = {}
        for some in unseen:
            asked = paint(some.packed[:64], *some.canvas)
            made = averaged.decode(averaged.encode(asked).latent_dist.mean).sample
            name = "x".join(map(str, some.canvas))
            figures[f"psnr {name}"] = decibels(made, asked).mean().item()
            pairs = torch.stack([asked, made], dim=1).flatten(0, 1)[:32].cpu()
            sheet([from_tensor(pixels) for pixels in pairs], 8).save(folder / f"vae-{name}.png")
        return figures

    fit(plan, nn.ModuleDict({"vae": vae}), loss_at, watch, folder, log)
    _whiten(vae, seen[0])
    return vae


def _crops(some: Corpus, count: int) -> Tensor:
    """[count, 3, 64, 64] of scenes, each around a point within an object or on its edge."""
    rows = torch.randint(len(some), (count,), device=device())
    packed = some.packed[rows].clone()
    objects = (packed[:, :, 0] >= 0).sum(1)
    chosen = 1 + (torch.rand(count, device=device()) * objects).long()
    picked = packed[torch.arange(count, device=device()), chosen]
    spread = torch.rand(2, count, 2, device=device())
    corner = picked[:, 1:3] + picked[:, 3:4] * (2 * spread[0] - 1) - _CROP * (0.1 + 0.8 * spread[1])
    limit = torch.tensor(some.canvas, device=device()) - _CROP
    corner = torch.minimum(corner.round().clamp(min=0), limit)
    packed[:, 1:, 1:3] -= corner[:, None]
    return paint(packed, _CROP, _CROP)


@torch.no_grad()
def _whiten(vae: AutoencoderKL, seen: Corpus) -> None:
    """Fold into the VAE what makes each latent channel's mean 0 and std 1 / scaling factor."""
    pixels = paint(seen.packed[:512], *seen.canvas)
    parts = [vae.encode(some).latent_dist.mean for some in pixels.split(64)]
    means = torch.cat(parts).transpose(0, 1).flatten(1)
    gain = 1 / (means.std(dim=1) * networks.SCALING_FACTOR)
    shift = -means.mean(dim=1) * gain
    into, out = vae.quant_conv, vae.post_quant_conv
    channels = networks.LATENT_CHANNELS
    into.weight[:channels] *= gain[:, None, None, None]
    into.bias[:channels] = into.bias[:channels] * gain + shift
    into.bias[channels:] += 2 * gain.log()  # the other half is a log variance
    out.weight /= gain[None, :, None, None]
    out.bias -= (out.weight[:, :, 0, 0] * shift).sum(dim=1)
