"""The large matrices in 8 or 4 bits through bitsandbytes, the rest in one dtype.

T5's `wo` stays as it is: transformers never quantises it, and nf4 on it gives garbage. With
bfloat16 for the rest T5-XXL holds 5.90 GB in 8 bits and 4.32 GB in 4 bits.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.errors import DeviceError
from lowvram.weights.checkpoint import (
    Resident,
    broken_files_named,
    check_complete,
    check_stored_quantisation,
)

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig

_NF4_BLOCK = 64  # weights that share a scale: the default of bitsandbytes


@dataclass(frozen=True)
class Quantized:
    """LLM.int8 (arXiv 2208.07339) for 8 bits, nf4 (arXiv 2305.14314) for 4."""

    bits: int
    dtype: "torch.dtype"

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.bits}bit"

    def config(self) -> "BitsAndBytesConfig":
        """What transformers is asked for."""
        from transformers import BitsAndBytesConfig

        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=self.dtype
        )

    def load(self, model_class: Any, folder: Path, device: "torch.device") -> Resident:
        """See `Weights.load`.

        Raises:
            DeviceError: bitsandbytes is not installed.
            ModelError: as `Weights.load`, and when the folder is quantised in another way.
        """
        try:
            import bitsandbytes  # noqa: F401 - asked for before minutes of loading
        except ImportError:
            raise DeviceError(
                f"{self.name} needs bitsandbytes, which is not installed: "
                "pip install bitsandbytes, or use --weights whole"
            ) from None
        stored = check_stored_quantisation(folder, f"load_in_{self.bits}bit")
        with broken_files_named(folder):
            model, info = model_class.from_pretrained(
                folder,
                dtype=self.dtype,
                quantization_config=None if stored else self.config(),
                device_map={"": str(device)},
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
            check_complete(model, list(info["missing_keys"]), folder)
        model.eval().requires_grad_(False)
        return Resident(model, device)

    def count_bytes(self, skeleton: "nn.Module") -> int:
        """Bytes that the weights will take, from a model on the meta device.

        The real quantiser says which matrices it takes; nothing is loaded.
        """
        from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
        from transformers.quantizers import AutoHfQuantizer

        quantizer = AutoHfQuantizer.from_config(self.config(), pre_quantized=False)
        quantizer.preprocess_model(model=skeleton, dtype=self.dtype, device_map=None)
        total, counted = 0, set()
        for module in skeleton.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) in counted:
                    continue
                counted.add(id(parameter))
                if isinstance(module, Linear8bitLt) and parameter.ndim == 2:
                    total += parameter.numel() + 4 * parameter.shape[0]  # a float32 scale a row
                elif isinstance(module, Linear4bit) and parameter.ndim == 2:
                    total += parameter.numel() // 2 + 4 * -(-parameter.numel() // _NF4_BLOCK)
                else:
                    total += parameter.numel() * self.dtype.itemsize
        return total
