"""PixArt-Sigma: T5 encoder, PixArt transformer, SDXL-style VAE (arXiv 2403.04692).

Defaults and arithmetic follow `PixArtSigmaPipeline` of diffusers 0.42, with which a staged run
agrees bit for bit in fp32 on the CPU.
"""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from lowvram.bins import BINNED, nearest_bin
from lowvram.errors import RequestError
from lowvram.families.family import (
    Component,
    Config,
    Family,
    Published,
    Size,
    guide,
    scaling_factor,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

MIN_SIDE, MAX_SIDE = 16, 8192  # px; a sanity limit, twice what the paper shows
MOST_TRAINED_SIDE = 2048  # px; of the 2K model's square, whose area no other size of it exceeds
NOTED_ENLARGEMENT = 1.5  # of the area

T5_XXL = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24,
    "vocab_size": 32128, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
}  # fmt: skip
XL_2 = {
    "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72,
    "cross_attention_dim": 1152, "caption_channels": 4096, "in_channels": 4, "out_channels": 8,
    "patch_size": 2, "sample_size": 128, "interpolation_scale": 2,
    "use_additional_conditions": False,
}  # fmt: skip
SDXL_VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "sample_size": 512, "scaling_factor": 0.13025, "force_upcast": False,
}  # fmt: skip
DPM_SOLVER = {
    "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++",
    "solver_order": 2, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
    "prediction_type": "epsilon",
}  # fmt: skip


class PixArtSigma(Family):
    """PixArt-Sigma and what is built like it."""

    name = "pixart-sigma"
    pipelines = ("PixArtSigmaPipeline",)
    transformers = ("Transformer2DModel", "PixArtTransformer2DModel")
    components = (
        Component(
            "tokenizer", "transformers.T5Tokenizer", "tokenizer",
            needs=("spiece.model", "tokenizer.json"),
        ),
        Component(
            "text_encoder", "transformers.T5EncoderModel", "text_encoder",
            dtype="bfloat16", blocks="encoder.block",
            overflows_in="fp16",  # in T5's feed-forward: diffusers issue 8604
        ),
        Component(
            "transformer", "diffusers.PixArtTransformer2DModel", "transformer",
            dtype="float16", blocks="transformer_blocks",
        ),
        Component("scheduler", "diffusers.DPMSolverMultistepScheduler", "scheduler"),
        Component("vae", "diffusers.AutoencoderKL", "vae", dtype="float16"),
    )  # fmt: skip
    # The 512, 2K and 256 px repositories hold a transformer only.
    models = {
        "pixart-sigma-256": Published(
            "PixArt-alpha/PixArt-Sigma-XL-2-256x256", base="pixart-sigma-1024", side=256
        ),
        "pixart-sigma-512": Published(
            "PixArt-alpha/PixArt-Sigma-XL-2-512-MS",
            "76fb7eb5a9314bc1e4e479d2f13447517fca9be4",
            base="pixart-sigma-1024",
            side=512,
        ),
        "pixart-sigma-1024": Published(
            "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
            "e102b3591cc82e97071b8b4cb90d834d0c487207",
            side=1024,
        ),
        "pixart-sigma-2k": Published(
            "PixArt-alpha/PixArt-Sigma-XL-2-2K-MS", base="pixart-sigma-1024", side=2048
        ),
        "demo": Published(
            "demo/model", bundled=True, steps=20, guidance_scale=2.0, side=128,
            sizes=((192, 128), (128, 192)), words="lowvram.demo.reading",
        ),
    }  # fmt: skip
    base = "pixart-sigma-1024"
    default_steps = 20  # PixArtSigmaPipeline.__call__, as the three below
    default_guidance_scale = 4.5
    max_tokens = 300
    published_configs = {
        "text_encoder": T5_XXL, "transformer": XL_2, "vae": SDXL_VAE, "scheduler": DPM_SOLVER,
    }  # fmt: skip
    tiny_configs = {
        "text_encoder": T5_XXL
        | {"d_model": 64, "d_ff": 128, "d_kv": 32, "num_heads": 2, "num_layers": 2}
        | {"vocab_size": 512},
        "transformer": XL_2
        | {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
        | {"cross_attention_dim": 32, "caption_channels": 64}
        | {"sample_size": 32, "interpolation_scale": 1},
        "vae": SDXL_VAE
        | {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 1, "norm_num_groups": 8},
        "scheduler": DPM_SOLVER,
    }

    def claims(self, transformer: Config) -> bool:
        """Published ones name the scale of their position embeddings; PixArt-alpha's do not."""
        return super().claims(transformer) and transformer.get("interpolation_scale") is not None

    def mismatch(self, configs: Mapping[str, Config]) -> str:
        """Channels between text encoder and transformer, transformer and VAE; and an f8 VAE."""
        text, transformer, vae = (configs[r] for r in ("text_encoder", "transformer", "vae"))
        made, taken = text.get("d_model"), transformer.get("caption_channels")
        if made != taken:
            return f"the text encoder makes {made} channels, and the transformer takes {taken}"
        made, taken = transformer.get("in_channels"), vae.get("latent_channels")
        if made != taken:
            return f"the transformer makes {made} channels, and the VAE takes {taken}"
        pixels = _pixels_per_cell(vae)
        return "" if pixels == 8 else f"the VAE makes {pixels} px of a cell, where 8 are computed"

    def text_channels(self, transformer: Config) -> int:
        """Before its own projection of them."""
        return int(transformer["caption_channels"])

    def clean(self, text: str, clean_caption: bool) -> str:
        """As `PixArtSigmaPipeline._text_preprocessing` does; it needs no loaded model."""
        return str(_pipeline()._text_preprocessing(text, clean_caption=clean_caption)[0])

    def encode(
        self, text_encoder: "nn.Module", ids: "Tensor", mask: "Tensor"
    ) -> "dict[str, Tensor]":
        """T5's last hidden state, `[batch, tokens, 4096]`, and the mask."""
        embeds: Tensor = text_encoder(ids, attention_mask=mask)[0]
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def conditions(
        self, positive: list[dict[str, "Tensor"]], negative: list[dict[str, "Tensor"]]
    ) -> dict[str, "Tensor"]:
        """Padded to the longest text of the batch; padding is masked in cross-attention."""
        from torch.nn.utils.rnn import pad_sequence

        texts = negative + positive
        return {
            name: pad_sequence([text[name] for text in texts], batch_first=True)
            for name in ("prompt_embeds", "prompt_attention_mask")
        }

    def predict(
        self,
        transformer: "nn.Module",
        latents: "Tensor",
        timestep: "Tensor",
        conditions: Mapping[str, "Tensor"],
        guidance_scale: float,
    ) -> "Tensor":
        """With guidance, the learned variance dropped."""
        import torch

        guided = guidance_scale > 1
        both = torch.cat([latents, latents]) if guided else latents
        predicted: Tensor = transformer(
            both,
            encoder_hidden_states=conditions["prompt_embeds"],
            encoder_attention_mask=conditions["prompt_attention_mask"],
            timestep=timestep.reshape(1).expand(both.shape[0]),
            added_cond_kwargs=self.size_conditions(transformer, both),
            return_dict=False,
        )[0]
        if guided:
            without, towards = predicted.chunk(2)
            predicted = guide(without, towards, guidance_scale)
        if predicted.shape[1] == 2 * latents.shape[1]:
            predicted = predicted.chunk(2, dim=1)[0]
        return predicted

    def size_conditions(self, transformer: Any, latents: "Tensor") -> dict[str, "Tensor | None"]:
        """What the transformer is told of the picture's size: nothing."""
        return {"resolution": None, "aspect_ratio": None}

    def unscale(self, latents: "Tensor", vae: Config) -> "Tensor":
        """Divided by the VAE's scaling factor."""
        return latents / scaling_factor(vae)

    def scale(self, latents: "Tensor", vae: Config) -> "Tensor":
        """Times the VAE's scaling factor, as diffusers' img2img pipelines do."""
        return latents * scaling_factor(vae)

    def size_like(self, configs: Mapping[str, Config], picture: Size, binning: bool) -> Size:
        """The nearest bin; without bins the model's own area, in multiples of 16 px."""
        cells, step = int(configs["transformer"]["sample_size"]), _step(configs)
        if binning and cells in BINNED:
            return Size(*nearest_bin(cells, picture.width, picture.height))
        aspect = picture.height / picture.width
        side = _side(configs)
        sides = (side * aspect**-0.5, side * aspect**0.5)
        return Size(*(min(MAX_SIDE, max(step, round(each / step) * step)) for each in sides))

    def render_size(
        self, configs: Mapping[str, Config], size: Size | None, binning: bool
    ) -> tuple[Size, Size]:
        """Bins as the pipeline does; of a model that has none the next multiples of 16 px. Without
        binning those only.
        """
        cells, side = int(configs["transformer"]["sample_size"]), _side(configs)
        asked = size or Size(side, side)
        sides = (asked.width, asked.height)
        if not all(MIN_SIDE <= side <= MAX_SIDE for side in sides):
            raise RequestError(
                f"size {asked} is out of range: each side must be {MIN_SIDE} to {MAX_SIDE} px"
            )
        if binning and cells in BINNED:
            return asked, Size(*nearest_bin(cells, asked.width, asked.height))
        step = _step(configs)
        rendered = Size(*(-(-side // step) * step for side in sides))
        if rendered != asked and not binning:
            nearest = Size(*(max(step, round(side / step) * step) for side in sides))
            raise RequestError(
                f"size {asked} is not a multiple of {step} px, which this model needs without "
                f"binning: use {nearest}"
            )
        return asked, rendered

    def size_note(
        self, name: str, configs: Mapping[str, Config], requested: Size, rendered: Size
    ) -> str:
        """For more than the model was trained for, and for what will be scaled up."""
        side = _side(configs)
        computed = rendered.width * rendered.height
        if computed > MOST_TRAINED_SIDE**2:
            return (
                f"{rendered} is more than any published checkpoint was trained for "
                f"({MOST_TRAINED_SIDE}x{MOST_TRAINED_SIDE}; no 4K checkpoint is published): "
                "this shows what fits into memory, and no good picture"
            )
        published = self.models.get(name)
        if published and (rendered.width, rendered.height) in published.sizes:
            return ""
        if computed > side**2:
            return f"{rendered} is more than this model was trained for ({side}x{side})"
        if requested.width * requested.height > NOTED_ENLARGEMENT * computed:
            return f"{requested} will be scaled up from {rendered}, which this model computes"
        return ""

    def latent_shape(self, configs: Mapping[str, Config], rendered: Size) -> tuple[int, int, int]:
        """`in_channels` of the transformer, and a cell for each 8 x 8 px of an f8 VAE."""
        pixels = _pixels_per_cell(configs["vae"])
        channels = int(configs["transformer"]["in_channels"])
        return channels, rendered.height // pixels, rendered.width // pixels


def _side(configs: Mapping[str, Config]) -> int:
    """Of the square that the model was trained for, px."""
    return int(configs["transformer"]["sample_size"]) * _pixels_per_cell(configs["vae"])


def _step(configs: Mapping[str, Config]) -> int:
    """Of what sides are multiples, px."""
    return _pixels_per_cell(configs["vae"]) * int(configs["transformer"]["patch_size"])


def _pixels_per_cell(vae: Config) -> int:
    return int(2 ** (len(vae["block_out_channels"]) - 1))


@cache
def _pipeline() -> Any:
    """A pipeline without components: only its text cleaning is called."""
    from diffusers import PixArtSigmaPipeline

    return PixArtSigmaPipeline.__new__(PixArtSigmaPipeline)


FAMILY = PixArtSigma()
