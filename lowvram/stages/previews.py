"""An early look: small pictures of what is being denoised, without a VAE on the device.

Eight by eight pixels of a picture are, to a first approximation, a linear map of the latent cell
that they are decoded from. The map is fitted once for each VAE, from the VAE itself: made-up
pictures are encoded and decoded with it, on the CPU in fp32, and the mean colour of each cell is
regressed on its latents. Afterwards it is a file of a few numbers in the cache, named after the
content of the VAE's files.

What is shown is not the noisy latents but the picture that the network expects to arrive at, which
its prediction tells at every step.
"""

import io
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts
from lowvram.component import use
from lowvram.errors import ModelError, StorageError
from lowvram.files import fingerprint, user_cache
from lowvram.memory.meter import Meter
from lowvram.memory.plan import Room
from lowvram.progress import OnProgress, Progress
from lowvram.repository import Model
from lowvram.stages.trial import Schedule
from lowvram.weights.whole import Whole

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SUFFIX = ".preview.png"

# step (from 0), levels [pictures, height, width, 3] in uint8, a pixel for each latent cell
OnPreview = Callable[[int, "np.ndarray"], None]

_PICTURES, _SIDE = 8, 128  # px: 2,048 cells of an f8 VAE, for a handful of unknowns
_SHOWN = 8  # pictures of a batch, side by side
_LEAST_SIDE = 256  # px of a written preview's longer side, at least

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Colours:
    """A linear map from the VAE's latents to colours.

    Attributes:
        weights: red, green and blue by channel, in -1..1; the last row is the constant.
    """

    weights: tuple[tuple[float, float, float], ...]

    def levels(self, latents: "Tensor") -> "np.ndarray":
        """Unscaled latents to `[pictures, height, width, 3]` in uint8."""
        import torch

        weights = torch.tensor(self.weights, dtype=torch.float32)
        colours = latents.float().cpu().movedim(1, -1) @ weights[:-1] + weights[-1]
        levels = ((colours.nan_to_num().clamp(-1, 1) + 1) * 127.5).round()
        return levels.to(torch.uint8).numpy()


def colours_of(model: Model, on_progress: OnProgress) -> Colours:
    """The map of a model's VAE: from the cache, else fitted now.

    Raises:
        ModelError: the VAE is not here.
    """
    try:
        folder = model.fetch("vae")
    except ModelError as error:
        raise ModelError(f"previews need the VAE, once: {error}; or leave out --preview") from None
    channels = int(model.config("vae")["latent_channels"])
    path = user_cache() / "previews" / f"{fingerprint(folder)}.json"
    found = _read(path, channels)
    if found is not None:
        return found
    log.info("fitting the colours of previews from the VAE")
    on_progress(Progress("denoise", "fitting preview colours from the VAE"))
    colours = _fit_to(model, folder)
    try:
        artifacts.write_bytes(path, json.dumps({"weights": colours.weights}).encode())
        log.info("kept in %s: the next previews take them from there", path)
    except StorageError:
        log.warning("%s cannot be written: the next previews fit their colours again", path)
    return colours


@dataclass
class Previews:
    """Writes a preview every few steps.

    Attributes:
        path: of the PNG, replaced each time.
        every: calls of the network.
        unscale: latents as the transformer works on them, to the VAE's.
    """

    path: Path
    every: int
    colours: Colours
    unscale: "Callable[[Tensor], Tensor]"
    on_preview: OnPreview | None = None
    _last: "tuple[Tensor, Tensor] | None" = field(default=None, repr=False)

    def watching(
        self, predict: "Callable[[Tensor, Tensor], Tensor]"
    ) -> "Callable[[Tensor, Tensor], Tensor]":
        """The same prediction, remembered until the next one."""

        def watched(scaled: "Tensor", timestep: "Tensor") -> "Tensor":
            self._last = None
            prediction = predict(scaled, timestep)
            self._last = (scaled, prediction)
            return prediction

        return watched

    def show(
        self, index: int, timestep: "Tensor", latents: "Tensor", scheduler: Any, steps: int
    ) -> None:
        """Write a preview if one is due after this step, and after the last.

        Args:
            steps: to be done; from a start on they are fewer than the scheduler's.
        """
        last = index + 1 == steps
        if not last and (index + 1) % self.every:
            return
        expected = latents
        if self._last is not None and not last:
            expected = expected_picture(*self._last, timestep, scheduler, latents)
        levels = self.colours.levels(self.unscale(expected.float().cpu()))
        artifacts.write_bytes(self.path, _png(levels))
        if self.on_preview is not None:
            self.on_preview(index, levels)


def path_of(latents: Path) -> Path:
    """x.latents.safetensors to x.preview.png."""
    name = latents.name.removesuffix(artifacts.SUFFIXES["latents"]).removesuffix(".safetensors")
    return latents.with_name(name + SUFFIX)


def expected_picture(
    scaled: "Tensor", prediction: "Tensor", timestep: "Tensor", scheduler: Any, latents: "Tensor"
) -> "Tensor":
    """The latents that the network expects at the end, by what it predicts now (on the CPU).

    Every scheduler gives the network latents scaled to `sqrt(a) x picture + sqrt(1 - a) x noise`,
    where `a` is `alphas_cumprod` at the timestep (arXiv 2006.11239, equation 4; for v-prediction
    arXiv 2202.00512, appendix D).

    Args:
        latents: what to fall back upon where a scheduler has no such table.
    """
    schedule = Schedule.of(scheduler)
    kind = scheduler.config.get("prediction_type", "epsilon")
    if schedule.alphas is None or kind not in ("epsilon", "v_prediction", "sample"):
        return latents
    given, told = scaled.float().cpu(), prediction.float().cpu()
    share = float(schedule.share(timestep))
    signal, noise = math.sqrt(share), math.sqrt(1 - share)
    if kind == "sample":
        return told
    if kind == "v_prediction":
        return signal * given - noise * told
    return (given - noise * told) / signal


def _fit_to(model: Model, folder: Path) -> Colours:
    """Load the VAE alone, on the CPU, and fit its map."""
    import torch

    cpu = torch.device("cpu")
    name = model.get_family().component("vae").class_name
    with Meter(cpu) as meter:
        used = use(
            name, folder, Whole(torch.float32), cpu, meter, Room(0), lambda vae: fit(vae.model)
        )
    return used.result


def fit(vae: Any) -> Colours:
    """The least-squares map of a VAE's latents to the mean colour of the pixels of each cell.

    Args:
        vae: of diffusers' kind, on the CPU in fp32.
    """
    import torch
    from torch.nn.functional import avg_pool2d

    rows, colours = [], []
    for picture in _made_up_pictures().split(1):
        latents = vae.encode(picture).latent_dist.mean
        pixels = vae.decode(latents).sample.clamp(-1, 1)
        means = avg_pool2d(pixels, pixels.shape[-1] // latents.shape[-1])
        rows.append(latents.movedim(1, -1).flatten(0, 2).double())
        colours.append(means.movedim(1, -1).flatten(0, 2).double())
    known = torch.cat(rows)
    known = torch.cat([known, known.new_ones(len(known), 1)], dim=1)
    found = torch.linalg.lstsq(known, torch.cat(colours)).solution
    return Colours(tuple(tuple(row) for row in found.tolist()))


def _made_up_pictures() -> "Tensor":
    """Colour noise, coarse before fine as in photographs, `[pictures, 3, side, side]` in -1..1."""
    import torch
    from torch.nn.functional import interpolate

    generator = torch.Generator().manual_seed(0)
    pictures = torch.zeros(_PICTURES, 3, _SIDE, _SIDE)
    for cells in (2, 4, 8, 16, 32):
        noise = torch.randn((_PICTURES, 3, cells, cells), generator=generator)
        noise = interpolate(noise, (_SIDE, _SIDE), mode="bicubic", align_corners=False)
        pictures += noise / math.sqrt(cells / 2)
    return pictures.tanh()


def _read(path: Path, channels: int) -> Colours | None:
    """A map from the cache; None where there is none that can be used."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["weights"]
        weights = tuple((float(r), float(g), float(b)) for r, g, b in rows)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    finite = all(math.isfinite(each) for row in weights for each in row)
    return Colours(weights) if finite and len(weights) == channels + 1 else None


def _png(levels: "np.ndarray") -> bytes:
    """Side by side, enlarged until one can see something."""
    import numpy as np
    from PIL import Image

    row = np.concatenate(list(levels[:_SHOWN]), axis=1)
    factor = max(1, -(-_LEAST_SIDE // max(levels.shape[1:3])))
    small = Image.fromarray(row)
    size = (factor * small.width, factor * small.height)
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()
