"""All weights on the device, in one dtype."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.weights.checkpoint import (
    Resident,
    broken_files_named,
    check_complete,
    check_stored_quantisation,
    named_tensors,
)

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Whole:
    """Every weight resident, converted to `dtype` while loading.

    Attributes:
        without: submodules that the work does not need: the encoder of a VAE that decodes.
    """

    dtype: "torch.dtype"
    without: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As on the command line."""
        return "whole"

    def sizes(self, network: "nn.Module") -> list[int]:
        """See `Weights.sizes`."""
        tensors = {
            id(tensor): tensor.numel() * tensor.element_size()
            for name, tensor in named_tensors(network).items()
            if not name.startswith(self.without)
        }
        return list(tensors.values())

    def load(self, model_class: Any, folder: Path, device: "torch.device") -> Resident:
        """See `Weights.load`. transformers and diffusers take the same arguments here."""
        check_stored_quantisation(folder, "")
        with broken_files_named(folder):
            model, info = model_class.from_pretrained(
                folder,
                dtype=self.dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
            check_complete(model, list(info["missing_keys"]), folder)
        model.eval().requires_grad_(False)
        for name in self.without:
            setattr(model, name, None)
        return Resident(model.to(device), device)
