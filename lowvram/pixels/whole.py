"""Decode a picture in one piece."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class WholeDecode:
    """Every feature map on the device at once: fastest, and the reference for the others."""

    name = "whole"

    def decode(self, vae: Any, latents: "Tensor") -> "Tensor":
        """Latents to pixels.

        Args:
            vae: an AutoencoderKL.
            latents: `[pictures, channels, height, width]`, unscaled, in the VAE's dtype.

        Returns:
            `[pictures, 3, 8 x height, 8 x width]`, nominally in [-1, 1].
        """
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
        return pixels
