"""The transformer's stage: it learns to draw what captions say, the text encoder along with it."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from transformers import T5EncoderModel, T5Tokenizer

from . import networks
from .corpus import CAPTIONS, Corpus, scene, tokens
from .drawing import paint
from .pictures import from_tensor, sheet
from .sampling import embed, judge, predict, sample
from .training import Figures, Log, Plan, device, fit, save, wait_for_all, worker, workers

_EMPTY, _FRAGMENT = 0.1, 0.22  # shares of empty captions, and of these and fragments
_JUDGED = 48  # held-out pictures drawn at each look


def train_denoiser(
    plan: Plan,
    folder: Path,
    log: Log,
    tokenizer_folder: Path,
    trained: tuple[T5EncoderModel, PixArtTransformer2DModel, AutoencoderKL],
    seen: list[Corpus],
    unseen: Corpus,
    model: Path,
) -> None:
    """Train the transformer and, slowly, the text encoder; export to `model` at each look."""
    text_encoder, transformer, vae = trained
    parts = nn.ModuleDict({"transformer": transformer, "text": text_encoder})
    latents = [latents_of(vae, some, folder) for some in seen]
    unseen_latents = latents_of(vae, unseen, folder)
    tokenizer = T5Tokenizer.from_pretrained(str(tokenizer_folder))
    empty = tokens(tokenizer, [""])[0].to(device())
    curve = networks.make_scheduler().alphas_cumprod.to(device())

    def loss_at(progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        # Square pictures in three steps of five, as scenes have it.
        canvas = int(torch.multinomial(torch.tensor([3.0, 1.0, 1.0]), 1))
        rows, texts, times = _batch(seen[canvas], empty, plan.batch // workers())
        return _error(curve, parts, latents[canvas][rows], texts, times), {}

    @torch.no_grad()
    def watch(parts: nn.ModuleDict, step: int) -> Figures:
        texts = unseen.whole[:, 0]
        times = torch.full((len(unseen),), 950, device=device())
        right = _error(curve, parts, unseen_latents, texts, times).item()
        shuffled = _error(curve, parts, unseen_latents, texts.roll(1, 0), times).item()
        made = sample(parts, networks.make_scheduler(), texts[:_JUDGED], empty, unseen.canvas)
        pixels = vae.decode(made / networks.SCALING_FACTOR).sample.cpu()
        pictures = [from_tensor(each) for each in pixels]
        sheet(pictures, columns=12).save(folder / "denoiser.png")
        networks.export(model, tokenizer_folder, parts["text"], parts["transformer"], vae)
        asked = [scene(unseen.canvas, True, index) for index in range(_JUDGED)]
        return {"held_out_950": right, "shuffled_950": shuffled} | judge(pictures, asked)

    fit(plan, parts, loss_at, watch, folder, log)


@torch.no_grad()
def latents_of(vae: AutoencoderKL, some: Corpus, folder: Path) -> Tensor:
    """Scaled latents of a corpus, [scenes, 4, height / 8, width / 8].

    On a CPU they are kept in `folder`, under the name of what they were made from.
    """
    path = folder / f"latents-{_digest([some.packed, *vae.encoder.parameters()])}.pt"
    if path.exists():
        kept: Tensor = torch.load(path, weights_only=True)["latents"]
        return kept
    size = 256 if device().type == "cuda" else 32
    batches = some.packed.chunk(workers())[worker()].split(size)
    made = [vae.encode(paint(batch, *some.canvas)).latent_dist.mean for batch in batches]
    mine = torch.cat(made) * networks.SCALING_FACTOR
    whole = _gathered(mine)
    if device().type == "cpu":  # a GPU makes them in seconds
        if worker() == 0:
            save({"latents": whole}, path)
        wait_for_all()
    return whole


def _batch(some: Corpus, empty: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes of a corpus by their rows, the tokens of a text for each, and timesteps; [count]."""
    rows = torch.randint(len(some), (count,), device=device())
    texts = some.whole[rows, torch.randint_like(rows, CAPTIONS)]
    dice = torch.rand(count, 1, device=device())
    texts = torch.where(dice < _FRAGMENT, some.fragments[rows], texts)
    texts = torch.where(dice < _EMPTY, empty, texts)
    # Half of the timesteps towards the noisy end, where the text decides.
    even, towards_noise = torch.rand(2, count, device=device())
    late = torch.rand(count, device=device()) < 0.5
    times = (1000 * torch.where(late, towards_noise.sqrt(), even)).long().clamp(max=999)
    return rows, texts, times


def _error(
    curve: Tensor, parts: nn.ModuleDict, clean: Tensor, texts: Tensor, times: Tensor
) -> Tensor:
    """Mean squared error of the velocity that is predicted from noised latents.

    Args:
        curve: the scheduler's cumulative product of alphas, [1000].
        clean: latents, [batch, 4, height / 8, width / 8].
        texts: tokens, [batch, 48].
        times: timesteps, [batch].
    """
    noise = torch.randn_like(clean)
    signal = curve[times].sqrt()[:, None, None, None]
    scale = (1 - curve[times]).sqrt()[:, None, None, None]
    noisy = signal * clean + scale * noise
    with torch.autocast(device().type, torch.bfloat16, enabled=device().type == "cuda"):
        embeds, mask = embed(parts["text"], texts)
        velocity = predict(parts["transformer"], noisy, embeds, mask, times)
    return F.mse_loss(velocity.float(), signal * noise - scale * clean)


def _digest(tensors: Iterable[Tensor]) -> str:
    told = hashlib.sha256()
    for tensor in tensors:
        told.update(tensor.detach().cpu().numpy().tobytes())
    return told.hexdigest()[:12]


def _gathered(mine: Tensor) -> Tensor:
    """The workers' tensors of one shape, one after the other."""
    if workers() == 1:
        return mine
    everyone = [torch.empty_like(mine) for _ in range(workers())]
    dist.all_gather(everyone, mine)
    return torch.cat(everyone)
