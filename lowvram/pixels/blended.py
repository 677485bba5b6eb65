"""Decode in tiles whose overlaps are blended: diffusers' own tiling. Not the pixels of the whole.

Each tile normalises over itself alone, so that colours and contrast differ from tile to tile;
blending hides the seams. Kept for comparison: strips take as little memory and change nothing.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lowvram.errors import RequestError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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

    def decode(
        self, vae: Any, latents: "Tensor", device: "torch.device", on_progress: "OnWork"
    ) -> "Tensor":
        """As `Pixels.decode`; logs the number of tiles.

        Raises:
            RequestError: all fits into one tile, where tiling would silently do nothing.
        """
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        with self._tiling(vae, latents.shape[-2] * scale, latents.shape[-1] * scale, scale):
            pixels: Tensor = vae.decode(latents.to(device), return_dict=False)[0].cpu()
        on_progress(1, 1)
        return pixels

    def encode(
        self, vae: Any, pixels: "Tensor", device: "torch.device", on_progress: "OnWork"
    ) -> "Tensor":
        """As `Pixels.encode`; raises what `decode` does."""
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        with self._tiling(vae, pixels.shape[-2], pixels.shape[-1], scale):
            parameters: Tensor = vae.encode(pixels.to(device)).latent_dist.parameters.cpu()
        on_progress(1, 1)
        return parameters

    @contextmanager
    def _tiling(self, vae: Any, height: int, width: int, scale: int) -> Iterator[None]:
        """The VAE with its tiling set as `AutoencoderKL.tiled_decode` reads it."""
        if max(height, width) <= self.tile:
            raise RequestError(
                f"a picture of {width}x{height} px fits into one tile of {self.tile} px, so that "
                "nothing would be blended: use --decode whole"
            )
        step = int(self.tile // scale * (1 - self.overlap)) * scale
        log.info(
            "blended: %d x %d tiles of %d px", -(-width // step), -(-height // step), self.tile
        )
        before = {name: getattr(vae, name) for name in _TILING}
        values = (True, self.tile, self.tile // scale, self.overlap)
        try:
            for name, value in zip(_TILING, values, strict=True):
                setattr(vae, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(vae, name, value)
