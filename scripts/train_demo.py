"""Train the demo model from nothing and export it to `lowvram/demo/model/`.

    torchrun --nproc-per-node 2 scripts/train_demo.py

draws its own pictures, needs no download and no GPU, and takes about 80 minutes on two CPU cores.
Stages: tokenizer, text encoder, VAE, latents, denoiser. Each leaves its result in
`.demo-training/`, so a stopped run goes on where it was; `log.jsonl` there has every figure.
A usable folder is exported after each stage and now and then while the denoiser trains.
"""

import argparse
import os
import random
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from transformers import T5EncoderModel, T5Tokenizer

from lowvram.demo import networks
from lowvram.demo.pictures import from_tensor, sheet, to_tensor
from lowvram.demo.sampling import ATTRIBUTES, embed, judge, predict, sample
from lowvram.demo.scenes import (
    CANVAS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    caption,
    draw,
    random_scene,
)
from lowvram.demo.training import Figures, Log, Plan, fit, save, wait_for_all, worker, workers

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = REPOSITORY / "lowvram" / "demo" / "model"

TEXT = Plan("text", 1200, 150, {"encoder": 2e-3, "readers": 2e-3}, 0.99, 200)
VAE = Plan("vae", 6000, 14 * 60, {"vae": 2e-3}, 0.995, 250)
DENOISER = Plan("denoiser", 8000, 2760, {"transformer": 1.2e-3, "text": 1e-4}, 0.998, 250)

BATCH = 64  # latents in a denoiser step
PICTURES = 20_000  # cached latents to train the denoiser on
HELD_OUT = 128  # cached latents of held-out scenes
CROP = 64  # px
Pairs = list[tuple[Tensor, Tensor]]  # of each attribute: logits [batch, values], truth [batch]
VALUES = (SHAPES, tuple(COLOURS), tuple(COLOURS), tuple(PLACES), tuple(SIZES))


class Readers(nn.Module):
    """Throw-away heads that read each attribute from the text embeddings.

    One learned query per attribute picks tokens, so a token has to carry the role of its colour
    (object or background) and not only its name.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(VALUES), width) * width**-0.5)
        self.heads = nn.ModuleList(nn.Linear(width, len(values)) for values in VALUES)

    def forward(self, embeds: Tensor, mask: Tensor) -> list[Tensor]:
        """`embeds` [batch, tokens, width], `mask` [batch, tokens] -> logits per attribute."""
        scores = torch.einsum("aw,btw->bat", self.queries, embeds)
        weights = scores.masked_fill(mask[:, None] == 0, -1e9).softmax(-1)
        pooled = weights @ embeds
        return [head(pooled[:, index]) for index, head in enumerate(self.heads)]


def train_text(folder: Path, log: Log, tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Teach the text encoder alone to name every attribute of a caption."""
    encoder = networks.make_text_encoder(tokenizer)
    parts = nn.ModuleDict({"encoder": encoder, "readers": Readers(encoder.config.d_model)})

    def read(parts: nn.ModuleDict, scenes: list[Scene], rng: random.Random) -> Pairs:
        captions = [caption(scene, rng) for scene in scenes]
        logits = parts["readers"](*embed(tokenizer, parts["encoder"], captions))
        said = zip(*(scene.said for scene in scenes), strict=True)
        return [
            (guess, torch.tensor([values.index(word) for word in words]))
            for guess, values, words in zip(logits, VALUES, said, strict=True)
        ]

    def loss_at(rng: random.Random, progress: float) -> tuple[Tensor, Figures]:
        scenes = [random_scene(rng) for _ in range(64 // workers())]
        losses = [F.cross_entropy(*pair) for pair in read(parts, scenes, rng)]
        return torch.stack(losses).sum(), {}

    @torch.no_grad()
    def watch(parts: nn.ModuleDict, step: int) -> Figures:
        rng = random.Random("held out")
        pairs = read(parts, [random_scene(rng, held_out=True) for _ in range(500)], rng)
        right = ((guess.argmax(-1) == truth).float().mean().item() for guess, truth in pairs)
        return dict(zip(ATTRIBUTES, right, strict=True))

    fit(TEXT, parts, loss_at, watch, folder, log)
    with torch.no_grad():
        rng = random.Random("scale")
        captions = [caption(random_scene(rng), rng) for _ in range(500)]
        embeds, mask = embed(tokenizer, encoder, captions)
        encoder.encoder.final_layer_norm.weight /= embeds[mask == 1].std()
    return encoder


def train_vae(folder: Path, log: Log) -> AutoencoderKL:
    """Train the autoencoder on crops, then on whole pictures, then whiten its latents."""
    vae = networks.make_vae()
    held_out = _pictures(32, held_out=True)

    def loss_at(rng: random.Random, progress: float) -> tuple[Tensor, Figures]:
        if progress < 0.8:
            pixels = torch.stack([_crop(random_scene(rng), rng) for _ in range(8 // workers())])
        else:
            pixels = torch.stack(
                [to_tensor(draw(random_scene(rng))) for _ in range(2 // workers())]
            )
        posterior = vae.encode(pixels).latent_dist
        error = vae.decode(posterior.sample()).sample - pixels
        l1, mse = error.abs().mean(), error.square().mean()
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return l1 + 2 * mse + edges + 1e-4 * kl, {"l1": l1.item(), "kl": kl.item()}

    @torch.no_grad()
    def watch(parts: nn.ModuleDict, step: int) -> Figures:
        averaged: Any = parts["vae"]
        seen = averaged.decode(averaged.encode(held_out).latent_dist.mean).sample
        pairs = torch.stack([held_out, seen], dim=1).flatten(0, 1)
        sheet([from_tensor(pixels) for pixels in pairs], columns=8).save(folder / "vae.png")
        error = (seen.clamp(-1, 1) - held_out) / 2
        psnr = -10 * error.square().mean(dim=(1, 2, 3)).log10().mean()
        return {"held_out_l1": error.abs().mean().item(), "held_out_psnr": psnr.item()}

    fit(VAE, nn.ModuleDict({"vae": vae}), loss_at, watch, folder, log)
    _whiten(vae)
    return vae


def _pictures(count: int, held_out: bool) -> Tensor:
    """[count, 3, 128, 128] in -1..1 of `picture_scene`s."""
    return torch.stack([to_tensor(draw(picture_scene(i, held_out))) for i in range(count)])


def picture_scene(index: int, held_out: bool) -> Scene:
    """The scene behind a cached latent: the same index is the same scene in every run."""
    return random_scene(random.Random(f"picture/{held_out}/{index}"), held_out)


def _crop(scene: Scene, rng: random.Random) -> Tensor:
    """[3, 64, 64] of a drawn scene, around a point within the object or on its edge."""
    corner = []
    for centre in PLACES[scene.place]:
        point = centre + SIZES[scene.size] * rng.uniform(-1, 1)
        corner.append(min(max(round(point - rng.uniform(0.1, 0.9) * CROP), 0), CANVAS - CROP))
    x, y = corner
    return to_tensor(draw(scene).crop((x, y, x + CROP, y + CROP)))


@torch.no_grad()
def _whiten(vae: AutoencoderKL) -> None:
    """Fold into the VAE what makes each latent channel's mean 0 and std 1 / scaling factor."""
    means = vae.encode(_pictures(256, held_out=False)).latent_dist.mean.transpose(0, 1).flatten(1)
    gain = 1 / (means.std(dim=1) * networks.SCALING_FACTOR)
    shift = -means.mean(dim=1) * gain
    into, out = vae.quant_conv, vae.post_quant_conv
    channels = networks.LATENT_CHANNELS
    into.weight[:channels] *= gain[:, None, None, None]
    into.bias[:channels] = into.bias[:channels] * gain + shift
    into.bias[channels:] += 2 * gain.log()  # the other half is a log variance
    out.weight /= gain[None, :, None, None]
    out.bias -= (out.weight[:, :, 0, 0] * shift).sum(dim=1)


@torch.no_grad()
def cache_latents(folder: Path, vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """Scaled latents of training and of held-out `picture_scene`s, [count, 4, 16, 16] each."""
    path = folder / "latents.pt"
    if not path.exists():
        sides = {}
        for name, held_out, count in (("seen", False, PICTURES), ("held_out", True, HELD_OUT)):
            batches = torch.arange(count).chunk(workers())[worker()].split(32)
            mine = torch.cat([_encode(vae, batch.tolist(), held_out) for batch in batches])
            sides[name] = _gathered(mine)
        if worker() == 0:
            save(sides, path)
        wait_for_all()
    sides = torch.load(path, weights_only=True)
    return sides["seen"], sides["held_out"]


def _gathered(mine: Tensor) -> Tensor:
    """The workers' tensors of one shape, one after the other."""
    if workers() == 1:
        return mine
    everyone = [torch.empty_like(mine) for _ in range(workers())]
    dist.all_gather(everyone, mine)
    return torch.cat(everyone)


def _encode(vae: AutoencoderKL, indices: list[int], held_out: bool) -> Tensor:
    pixels = torch.stack([to_tensor(draw(picture_scene(i, held_out))) for i in indices])
    return vae.encode(pixels).latent_dist.mean * networks.SCALING_FACTOR


def train_denoiser(
    folder: Path,
    log: Log,
    tokenizer: T5Tokenizer,
    text_encoder: T5EncoderModel,
    vae: AutoencoderKL,
) -> PixArtTransformer2DModel:
    """Train the transformer, and the text encoder along with it at a low rate."""
    seen, unseen = cache_latents(folder, vae)
    seen_scenes = [picture_scene(i, held_out=False) for i in range(len(seen))]
    unseen_scenes = [picture_scene(i, held_out=True) for i in range(len(unseen))]
    transformer, scheduler = networks.make_transformer(), networks.make_scheduler()
    parts = nn.ModuleDict({"transformer": transformer, "text": text_encoder})

    def error(parts: nn.ModuleDict, latents: Tensor, captions: list[str], times: Tensor) -> Tensor:
        noise = torch.randn_like(latents)
        signal = scheduler.alphas_cumprod[times].sqrt()[:, None, None, None]
        scale = (1 - scheduler.alphas_cumprod[times]).sqrt()[:, None, None, None]
        embeds, mask = embed(tokenizer, parts["text"], captions)
        noisy = signal * latents + scale * noise
        velocity = predict(parts["transformer"], noisy, embeds, mask, times)
        return F.mse_loss(velocity, signal * noise - scale * latents)

    def loss_at(rng: random.Random, progress: float) -> tuple[Tensor, Figures]:
        indices = rng.sample(range(len(seen)), BATCH // workers())
        captions = [
            "" if rng.random() < 0.1 else caption(seen_scenes[index], rng) for index in indices
        ]
        times = (1000 * torch.rand(len(indices)).sqrt()).long().clamp(max=999)
        return error(parts, seen[indices], captions, times), {}

    @torch.no_grad()
    def watch(parts: nn.ModuleDict, step: int) -> Figures:
        torch.manual_seed(0)
        rng = random.Random("held out")
        captions = [caption(scene, rng) for scene in unseen_scenes]
        times = torch.full((len(unseen),), 950)
        right = error(parts, unseen, captions, times).item()
        shuffled = error(parts, unseen, captions[1:] + captions[:1], times).item()
        asked = 16
        latents = sample(parts, tokenizer, scheduler, captions[:asked])
        decoded = vae.decode(latents / networks.SCALING_FACTOR).sample
        pictures = [from_tensor(pixels) for pixels in decoded]
        sheet(pictures, columns=8).save(folder / f"denoiser-{step:05d}.png")
        networks.export(MODEL, folder / "tokenizer", parts["text"], parts["transformer"], vae)
        return {"held_out_950": right, "shuffled_950": shuffled} | judge(
            pictures, unseen_scenes[:asked]
        )

    fit(DENOISER, parts, loss_at, watch, folder, log)
    return transformer


def main() -> None:
    """Run all stages, or what is left of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=REPOSITORY / ".demo-training")
    folder = parser.parse_args().work
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder / "log.jsonl")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    tokenizer_folder = folder / "tokenizer"
    if worker() == 0:
        networks.make_tokenizer(tokenizer_folder)
    wait_for_all()
    tokenizer = T5Tokenizer.from_pretrained(str(tokenizer_folder))
    torch.manual_seed(0)
    text_encoder = train_text(folder, log, tokenizer)
    vae = train_vae(folder, log)
    transformer = train_denoiser(folder, log, tokenizer, text_encoder, vae)
    if worker() == 0:
        networks.export(MODEL, tokenizer_folder, text_encoder, transformer, vae)


if __name__ == "__main__":
    main()
