"""Pictures from parts in training, as the pipeline makes them, and what the judge sees in them."""

import copy

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from PIL import Image
from torch import Tensor, nn

from .detector import look, right_shares, verdict
from .networks import LATENT_CHANNELS
from .scenes import Scene
from .training import Figures


def embed(encoder: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Padded tokens [batch, tokens] -> embeddings [batch, tokens, width] and their mask."""
    mask = (tokens != 0).long()
    return encoder(tokens.long(), mask)[0], mask


def predict(
    transformer: PixArtTransformer2DModel,
    noisy: Tensor,
    embeds: Tensor,
    mask: Tensor,
    times: Tensor,
) -> Tensor:
    """The predicted velocity, [batch, 4, height / 8, width / 8]."""
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
    scheduler: DPMSolverMultistepScheduler,
    tokens: Tensor,
    empty: Tensor,
    canvas: tuple[int, int],
    steps: int = 10,
    guidance: float = 2.0,
) -> Tensor:
    """Latents for `tokens` [batch, tokens], guided away from `empty` [tokens], as the pipeline."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, device=tokens.device)
    embeds, mask = embed(parts["text"], torch.cat([tokens, empty.expand_as(tokens)]))
    width, height = canvas
    latents = torch.randn(
        len(tokens), LATENT_CHANNELS, height // 8, width // 8, device=tokens.device
    )
    for time in scheduler.timesteps:
        times = time.expand(2 * len(tokens))
        velocity = predict(parts["transformer"], latents.repeat(2, 1, 1, 1), embeds, mask, times)
        told, free = velocity.float().chunk(2)
        latents = scheduler.step(free + guidance * (told - free), time, latents).prev_sample
    return latents


def judge(pictures: list[Image.Image], scenes: list[Scene]) -> Figures:
    """The share of pictures in which the detector sees what was asked for, by attribute."""
    pairs = zip(pictures, scenes, strict=True)
    return right_shares([verdict(look(picture), scene) for picture, scene in pairs])
