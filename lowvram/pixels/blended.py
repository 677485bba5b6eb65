"""Decode in tiles whose overlaps are blended: diffusers' own tiling. Not the pixels of the whole.

Each tile normalises over itself alone, so that colours and contrast differ from tile to tile;
blending hides the seams. Kept for comparison: strips take as little memory and change nothing.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lowvram.errors import RequestError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowvram.pixels.strategy import OnWork

log = logging.getLogger(__name__)

_TILING = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor")


@dataclass(frozen=True)
class BlendedDecode:
    """Tiles of a given size.

    Attributes:
        tile: side in px, a multiple of the VAE's 8.
        overlap: of neighbours, as a part of a tile.
    """

    tile: int
    overlap: float

    name: ClassVar[str] = "blended"

    def settings(self) -> dict[str, Any]:
        """See `Pixels.settings`: the tiles change the picture."""
        return {"strategy": self.name, "tile": self.tile, "overlap": self.overlap}

    def decode(
        self, vae: Any, latents: "Tensor", device: "torch.device", on_progress: "OnWork"
    ) -> "Tensor":
        """As `Pixels.decode`; logs the number of tiles, each of which is a step of progress.

        Raises:
            RequestError: all fits into one tile, where tiling would silently do nothing, or tiles
                and overlaps are not whole cells of the latents.
        """
        scale = _pixels_per_cell(vae)
        tiles = self._tiles(latents.shape[-2] * scale, latents.shape[-1] * scale, scale)
        steps = math.prod(tiles) * (len(latents) if vae.use_slicing else 1)
        with self._tiling(vae, scale), _counted(vae.decoder, steps, on_progress):
            pixels: Tensor = vae.decode(latents.to(device), return_dict=False)[0].cpu()
        return pixels

    def encode(
        self, vae: Any, pixels: "Tensor", device: "torch.device", on_progress: "OnWork"
    ) -> "Tensor":
        """As `Pixels.encode`; raises what `decode` does."""
        scale = _pixels_per_cell(vae)
        tiles = self._tiles(pixels.shape[-2], pixels.shape[-1], scale)
        steps = math.prod(tiles) * (len(pixels) if vae.use_slicing else 1)
        with self._tiling(vae, scale), _counted(vae.encoder, steps, on_progress):
            parameters: Tensor = vae.encode(pixels.to(device)).latent_dist.parameters.cpu()
        return parameters

    def _tiles(self, height: int, width: int, scale: int) -> tuple[int, int]:
        """How many tiles, across and down."""
        if max(height, width) <= self.tile:
            raise RequestError(
                f"a picture of {width}x{height} px fits into one tile of {self.tile} px, so that "
                "nothing would be blended: use --decode whole"
            )
        step = self.tile * (1 - self.overlap)
        if self.tile % scale or step % scale or not 0 < step <= self.tile:
            # diffusers would round latents and pixels apart: a picture of another size.
            raise RequestError(
                f"tiles of {self.tile} px with an overlap of {self.overlap:g} are not whole cells "
                f"of {scale} px: use --decode whole or strips"
            )
        across, down = -(-width // int(step)), -(-height // int(step))
        log.info("blended: %d x %d tiles of %d px", across, down, self.tile)
        return across, down

    @contextmanager
    def _tiling(self, vae: Any, scale: int) -> Iterator[None]:
        """The VAE with its tiling set as `AutoencoderKL.tiled_decode` reads it."""
        before = {name: getattr(vae, name) for name in _TILING}
        values = (True, self.tile, self.tile // scale, self.overlap)
        try:
            for name, value in zip(_TILING, values, strict=True):
                setattr(vae, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(vae, name, value)


@contextmanager
def _counted(network: "nn.Module", steps: int, on_progress: "OnWork") -> Iterator[None]:
    """Tell of every call of the network."""
    done = 0

    def step(*_: object) -> None:
        nonlocal done
        done += 1
        on_progress(done, steps)

    hook = network.register_forward_hook(step)
    try:
        yield
    finally:
        hook.remove()


def _pixels_per_cell(vae: Any) -> int:
    return int(2 ** (len(vae.config.block_out_channels) - 1))
