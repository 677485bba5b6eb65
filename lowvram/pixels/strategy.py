"""What a strategy for pixels is: a small frozen value that runs a VAE on a device."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OnWork = Callable[[int, int], None]  # work done and work in all, in a unit of the strategy's own


class Pixels(Protocol):
    """Latents to pixels and back; tensors come from the host and return to it.

    The caller has put the half of the VAE that is needed on the device.
    """

    @property
    def name(self) -> str:
        """ "whole", "strips" or "blended"."""
        ...

    def settings(self) -> dict[str, Any]:
        """What a picture's record says of it."""
        ...

    def decode(
        self, vae: Any, latents: "Tensor", device: "torch.device", on_progress: OnWork
    ) -> "Tensor":
        """Latents to pixels.

        Args:
            vae: an AutoencoderKL.
            latents: `[pictures, channels, height, width]`, unscaled, in the VAE's dtype, on the
                host.
            on_progress: called as work proceeds; the total never changes and is reached.

        Returns:
            `[pictures, 3, 8 x height, 8 x width]` in the VAE's dtype on the host, nominally in
            [-1, 1].

        Raises:
            RequestError: this strategy cannot decode this VAE, this size or in this room.
        """
        ...

    def encode(
        self, vae: Any, pixels: "Tensor", device: "torch.device", on_progress: OnWork
    ) -> "Tensor":
        """Pixels to the parameters of the posterior: means and log variances.

        Args:
            pixels: `[pictures, 3, height, width]`, in the VAE's dtype, on the host.

        Returns:
            `[pictures, 2 x channels, height / 8, width / 8]`, what
            `vae.encode(x).latent_dist.parameters` is, on the host.
        """
        ...
