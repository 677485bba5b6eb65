"""How well the demo's VAE gives held-out drawings back: for `prompt_following.py`."""

import random

import torch
from diffusers import AutoencoderKL

from lowvram.demo.drawing import render
from lowvram.demo.scenes import CANVASES, random_scene
from lowvram.repository import resolve

_EACH = 64  # drawings of each canvas


@torch.inference_mode()
def psnr(model: str) -> dict[str, float]:
    """Mean PSNR in dB, by canvas, of drawings that no training saw, in float32."""
    vae = AutoencoderKL.from_pretrained(resolve(model).fetch("vae")).float().eval()
    found = {}
    for canvas in CANVASES:
        rng = random.Random(f"reconstruction/{canvas}")
        scenes = [random_scene(rng, held_out=True, canvas=canvas) for _ in range(_EACH)]
        errors = []
        for drawn in render(scenes).split(8):
            made = vae.decode(vae.encode(drawn).latent_dist.mean).sample.clamp(-1, 1)
            errors.append(((made - drawn) / 2).square().mean(dim=(1, 2, 3)))
        decibels = -10 * torch.cat(errors).log10()
        found["x".join(map(str, canvas))] = round(decibels.mean().item(), 2)
    return found
