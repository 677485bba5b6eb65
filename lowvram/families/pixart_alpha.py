"""PixArt-alpha: PixArt-Sigma's forerunner, and what was distilled from it (arXiv 2310.00426).

What differs from PixArt-Sigma: 120 tokens, the VAE of Stable Diffusion 1.5, and a 1024 px model
that is told the size it computes. Arithmetic follows `PixArtAlphaPipeline` of diffusers 0.42, with
which a staged run agrees bit for bit in fp32 on the CPU.
"""

from typing import TYPE_CHECKING, Any

from lowvram.families.family import Config, Published
from lowvram.families.pixart import DPM_SOLVER, SDXL_VAE, T5_XXL, XL_2, PixArtSigma

if TYPE_CHECKING:
    from torch import Tensor

PIXELS_PER_CELL = 8  # of the pipeline's tables of sizes, and of every published VAE

# The published 1024 px model: what its size conditions are, its class finds out by itself.
ALPHA_XL_2 = {
    name: value
    for name, value in XL_2.items()
    if name not in ("interpolation_scale", "use_additional_conditions")
}
# sd-vae-ft-ema, as published with PixArt-alpha.
SD_VAE = SDXL_VAE | {"sample_size": 256, "scaling_factor": 0.18215, "force_upcast": True}


class PixArtAlpha(PixArtSigma):
    """PixArt-alpha and what is built like it."""

    name = "pixart-alpha"
    pipelines = ("PixArtAlphaPipeline",)
    # The 256 px repository holds a transformer only, and that of DMD the scheduler besides.
    models = {
        "pixart-alpha-256": Published(
            "PixArt-alpha/PixArt-XL-2-256x256", base="pixart-alpha-512", side=256
        ),
        "pixart-alpha-512": Published("PixArt-alpha/PixArt-XL-2-512x512", side=512),
        "pixart-alpha-1024": Published("PixArt-alpha/PixArt-XL-2-1024-MS", side=1024),
        # Latent consistency: four steps of LCMScheduler without guidance, says its model card.
        "pixart-alpha-1024-lcm": Published(
            "PixArt-alpha/PixArt-LCM-XL-2-1024-MS", steps=4, guidance_scale=1.0, side=1024
        ),
        # Distribution matching: one step from timestep 400 without guidance, and text encoder and
        # VAE of the 1024 px model (app/app_pixart_dmd.py of PixArt-sigma's repository).
        "pixart-alpha-512-dmd": Published(
            "PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512",
            "57df7bb32daad69bc1d6c825a275935113802169",
            base="pixart-alpha-1024",
            own=("transformer", "scheduler"),
            pickled=("transformer",),
            steps=1,
            guidance_scale=1.0,
            timesteps=(400,),
            side=512,
        ),
    }
    base = "pixart-alpha-1024"
    max_tokens = 120  # PixArtAlphaPipeline.__call__
    published_configs = {
        "text_encoder": T5_XXL, "transformer": ALPHA_XL_2, "vae": SD_VAE, "scheduler": DPM_SOLVER,
    }  # fmt: skip
    tiny_configs = {
        **PixArtSigma.tiny_configs,
        "transformer": ALPHA_XL_2
        # a width that three parts of the size conditions fill
        | {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 24}
        | {"cross_attention_dim": 48, "caption_channels": 64, "sample_size": 32},
        "vae": SD_VAE
        | {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 1, "norm_num_groups": 8},
    }

    def claims(self, transformer: Config) -> bool:
        """No published one names the scale of its position embeddings."""
        named = transformer.get("_class_name") in self.transformers
        return named and transformer.get("interpolation_scale") is None

    def size_conditions(self, transformer: Any, latents: "Tensor") -> dict[str, "Tensor | None"]:
        """Height and width in px, and their ratio, of what is computed (not of what was asked for),
        for each picture of each guidance branch: `[branches x pictures, 2]` and `[…, 1]`.
        """
        import torch

        if not transformer.use_additional_conditions:
            return super().size_conditions(transformer, latents)
        batch, height, width = latents.shape[0], latents.shape[-2], latents.shape[-1]
        sides = [float(PIXELS_PER_CELL * height), float(PIXELS_PER_CELL * width)]
        columns = [
            torch.full((batch, 1), value, dtype=torch.float32, device=latents.device)
            for value in (*sides, height / width)
        ]
        return {
            "resolution": torch.cat(columns[:2], dim=1).to(latents.dtype),
            "aspect_ratio": columns[2].to(latents.dtype),
        }

    def stepped(self, outputs: "tuple[Tensor, ...]", steps: int) -> "Tensor":
        """Of a single step the predicted original, where the scheduler gives it: without noise."""
        return outputs[1] if steps == 1 and len(outputs) > 1 else outputs[0]


FAMILY = PixArtAlpha()
