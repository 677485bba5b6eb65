"""Pictures from parts in training, as the pipeline makes them, and what the judge sees in them."""

import copy

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from transformers import T5Tokenizer

from .detector import look
from .networks import LATENT_CHANNELS, LATENT_SIDE
from .scenes import Scene
from .training import Figures

ATTRIBUTES = ("shape", "colour", "background", "place", "size")


def embed(tokenizer: T5Tokenizer, encoder: nn.Module, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Embeddings [batch, longest, width] and attention mask [batch, longest] of captions."""
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    return encoder(tokens.input_ids, tokens.attention_mask)[0], tokens.attention_mask


def predict(
    transformer: PixArtTransformer2DModel,
    noisy: Tensor,
    embeds: Tensor,
    mask: Tensor,
    times: Tensor,
) -> Tensor:
    """The predicted velocity, [batch, 4, 16, 16]."""
    output = transformer(
        noisy,
        encoder_hidden_states=embeds,
        encoder_attention_mask=mask,
        timestep=times,
        return_dict=False,
    )[0]
    return output.chunk(2, dim=1)[0]


def sample(
    parts: nn.ModuleDict,
    tokenizer: T5Tokenizer,
    scheduler: DPMSolverMultistepScheduler,
    captions: list[str],
    steps: int = 10,
    guidance: float = 2.0,
) -> Tensor:
    """Latents for captions, as the pipeline would make them, [batch, 4, 16, 16]."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    embeds, mask = embed(tokenizer, parts["text"], captions + [""] * len(captions))
    latents = torch.randn(len(captions), LATENT_CHANNELS, *[LATENT_SIDE] * 2)
    for time in scheduler.timesteps:
        times = time.expand(2 * len(captions))
        velocity = predict(parts["transformer"], latents.repeat(2, 1, 1, 1), embeds, mask, times)
        told, free = velocity.chunk(2)
        latents = scheduler.step(free + guidance * (told - free), time, latents).prev_sample
    return latents


def judge(pictures: list[Image.Image], scenes: list[Scene]) -> Figures:
    """The share of pictures in which the detector sees what was asked for, by attribute."""
    seen = [look(picture).said for picture in pictures]
    right = [
        sum(a[i] == scene.said[i] for a, scene in zip(seen, scenes, strict=True)) / len(scenes)
        for i in range(len(ATTRIBUTES))
    ]
    return dict(zip(ATTRIBUTES, right, strict=True))
