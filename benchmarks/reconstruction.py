"""How well the demo's VAE gives held-out drawings back: for `prompt_following.py`."""

import random

import torch
from diffusers import AutoencoderKL

from lowvram.demo.drawing import render
from lowvram.demo.pictures import decibels
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
        found_here = []
        for drawn in render(scenes).split(8):
            made = vae.decode(vae.encode(drawn).latent_dist.mean).sample
            found_here.append(decibels(made, drawn))
        found["x".join(map(str, canvas))] = round(torch.cat(found_here).mean().item(), 2)
    return found
