"""The large matrices in 8 or 4 bits through bitsandbytes, the rest in one dtype.

T5's `wo` stays as it is: transformers never quantises it, and nf4 on it gives garbage. With
bfloat16 for the rest T5-XXL holds 5.90 GB in 8 bits and 4.32 GB in 4 bits.
"""

import copy
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
# A weight while its matrix is laid out anew: as int32, twice as uint8, and its halves.
_PACKING_BYTES = 7
_PACKED_ROWS = 32  # that its kernel for CPUs with AVX512-BF16 takes at once


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
        self._check_installed()  # before minutes of loading
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
        _leave_unpacked(model)
        model.eval().requires_grad_(False)
        return Resident(model, device)

    def sizes(self, network: "nn.Module") -> list[int]:
        """See `Weights.sizes`; scales count with their matrices.

        The real quantiser says which matrices it takes; nothing is loaded.

        Raises:
            DeviceError: bitsandbytes is not installed.
        """
        self._check_installed()
        from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

        found: dict[int, int] = {}
        for module in self._quantised(network).modules():
            for parameter in module.parameters(recurse=False):
                size = parameter.numel() * self.dtype.itemsize
                if isinstance(module, Linear8bitLt) and parameter.ndim == 2:
                    size = parameter.numel() + 4 * parameter.shape[0]  # a float32 scale a row
                elif isinstance(module, Linear4bit) and parameter.ndim == 2:
                    size = parameter.numel() // 2 + 4 * -(-parameter.numel() // _NF4_BLOCK)
                found[id(parameter)] = size
        return list(found.values())

    def workspace(self, network: "nn.Module", tokens: int, device_type: str) -> int:
        """Bytes that bitsandbytes' kernels take beside what the network's own operations do.

        4 bits: a matrix in the dtype, made anew for each product; a CPU with AVX512-BF16 lays it
        out anew instead, once, with 7 bytes for each weight meanwhile. 8 bits: the input in int8
        and the product in int32; on a CPU the matrix in float32 besides. Source:
        `autograd/_functions.py` and `functional.py` of bitsandbytes 0.50, and for the CPU the
        allocator's record.
        """
        from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

        taken = [
            module
            for module in self._quantised(network).modules()
            if isinstance(module, (Linear4bit, Linear8bitLt))
        ]
        if self.bits == 4:
            return max(
                m.in_features
                * m.out_features
                * (_PACKING_BYTES if device_type == "cpu" and _packs(m) else self.dtype.itemsize)
                for m in taken
            )
        whole = 4 if device_type == "cpu" else 0
        return max(
            tokens * (m.in_features + 4 * m.out_features) + whole * m.in_features * m.out_features
            for m in taken
        )

    def _check_installed(self) -> None:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            raise DeviceError(
                f"{self.name} needs bitsandbytes, which is not installed: "
                "pip install bitsandbytes, or use --weights whole"
            ) from None

    def _quantised(self, network: "nn.Module") -> "nn.Module":
        """A copy without storage, with the layers of bitsandbytes in their places."""
        from transformers.quantizers import AutoHfQuantizer

        skeleton = copy.deepcopy(network)
        quantizer = AutoHfQuantizer.from_config(self.config(), pre_quantized=False)
        quantizer.preprocess_model(model=skeleton, dtype=self.dtype, device_map=None)
        return skeleton


def _leave_unpacked(model: "nn.Module") -> None:
    """Have matrices computed the plain way that bitsandbytes' layout for CPUs with AVX512-BF16 does
    not hold: it raises in the first product (0.50.2, `_convert_weight_packed_for_cpu`).
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit) and not _can_pack(module):
            module.support_avx512bf16_for_cpu = False


def _can_pack(layer: "nn.Linear") -> bool:
    return not (layer.in_features % _NF4_BLOCK or layer.out_features % _PACKED_ROWS)


def _packs(layer: "nn.Linear") -> bool:
    """Whether bitsandbytes lays the matrix of a `Linear4bit` out anew on this CPU."""
    return _can_pack(layer) and bool(getattr(layer, "support_avx512bf16_for_cpu", False))
