"""Decode and encode pictures in one piece."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowvram.pixels.strategy import OnWork


@dataclass(frozen=True)
class WholeDecode:
    """Every feature map on the device at once: fastest, and the reference for the others."""

    name: ClassVar[str] = "whole"

    def settings(self) -> dict[str, Any]:
        """See `Pixels.settings`."""
        return {"strategy": self.name}

    def decode(
        self, vae: Any, latents: "Tensor", device: "torch.device", on_progress: "OnWork"
    ) -> "Tensor":
        """As `Pixels.decode`."""
        pixels: Tensor = vae.decode(latents.to(device), return_dict=False)[0].cpu()
        on_progress(1, 1)
        return pixels

    def encode(
        self, vae: Any, pixels: "Tensor", device: "torch.device", on_progress: "OnWork"
    ) -> "Tensor":
        """As `Pixels.encode`."""
        parameters: Tensor = vae.encode(pixels.to(device)).latent_dist.parameters.cpu()
        on_progress(1, 1)
        return parameters
