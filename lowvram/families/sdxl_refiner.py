"""SDXL refiner: CLIP text encoder, UNet, SDXL's VAE (arXiv 2307.01952).

It works on a picture that is there already, and adds fine detail. Defaults and arithmetic follow
`StableDiffusionXLImg2ImgPipeline` of diffusers 0.42, with which a staged run agrees bit for bit in
fp32 on the CPU.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

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

MIN_SIDE, MAX_SIDE = 16, 8192  # px
_PIXELS_PER_CELL = 8
_CLIP_LAYERS = "text_model.encoder.layers"

CLIP_BIG_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu",
    "max_position_embeddings": 77, "vocab_size": 49408,
    # As published: 2 stands for "the largest id of a text", see transformers' CLIPTextModel.
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
UNET = {
    "block_out_channels": [384, 768, 1536, 1536], "layers_per_block": 2,
    "transformer_layers_per_block": 4, "attention_head_dim": [6, 12, 24, 24],
    "down_block_types": [
        "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"
    ],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn", "cross_attention_dim": 1280,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2560,  # the pooled text, and 5 numbers
    "use_linear_projection": True, "sample_size": 128, "in_channels": 4, "out_channels": 4,
}  # fmt: skip
SDXL_VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "sample_size": 1024, "scaling_factor": 0.13025,
    "force_upcast": True,  # in fp16 its feature maps pass 65504
}  # fmt: skip
EULER = {
    "_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon",
    "timestep_spacing": "leading", "steps_offset": 1, "interpolation_type": "linear",
}  # fmt: skip


def _parts(place: str, attends: bool, *last: str) -> Iterator[str]:
    """What holds weights in a block of two layers, in order of use; paths in the UNet."""
    for layer in range(1 if place == "mid_block" else 3 if place.startswith("up") else 2):
        yield f"{place}.resnets.{layer}"
        if attends:
            attention = f"{place}.attentions.{layer}"
            yield from (f"{attention}.proj_in", f"{attention}.transformer_blocks")
            yield f"{attention}.proj_out"
    yield from (f"{place}.{each}" for each in last)


BLOCKS = (
    "time_embedding",
    "add_embedding",
    *_parts("down_blocks.0", False, "downsamplers.0"),
    *_parts("down_blocks.1", True, "downsamplers.0"),
    *_parts("down_blocks.2", True, "downsamplers.0"),
    *_parts("down_blocks.3", False),
    *_parts("mid_block", True, "resnets.1"),
    *_parts("up_blocks.0", False, "upsamplers.0"),
    *_parts("up_blocks.1", True, "upsamplers.0"),
    *_parts("up_blocks.2", True, "upsamplers.0"),
    *_parts("up_blocks.3", False),
)


class SdxlRefiner(Family):
    """The refiner of SDXL 1.0 and what is built like it."""

    name = "sdxl-refiner"
    pipelines = ("StableDiffusionXLImg2ImgPipeline",)
    foreign = ("text_encoder",)  # of SDXL's base model, which the same pipeline can hold
    text_tensors = ("prompt_embeds", "pooled_prompt_embeds")
    transformers = ()  # a lone UNet does not say which model it belongs to
    components = (
        Component(
            "tokenizer", "transformers.CLIPTokenizer", "tokenizer_2",
            needs=("vocab.json", "tokenizer.json"),
        ),
        Component(
            "text_encoder", "transformers.CLIPTextModelWithProjection", "text_encoder_2",
            dtype="float16", blocks=_CLIP_LAYERS,
            order=("q_proj", "k_proj", "v_proj"),
        ),
        Component(
            "transformer", "diffusers.UNet2DConditionModel", "unet",
            dtype="float16", blocks=BLOCKS,
        ),
        Component("scheduler", "diffusers.EulerDiscreteScheduler", "scheduler"),
        Component("vae", "diffusers.AutoencoderKL", "vae", dtype="float16"),
    )  # fmt: skip
    models = {"sdxl-refiner": Published("stabilityai/stable-diffusion-xl-refiner-1.0")}
    base = "sdxl-refiner"
    default_steps = 50  # StableDiffusionXLImg2ImgPipeline.__call__, as the three below
    default_guidance_scale = 5.0
    aesthetic_scores = (6.0, 2.5)
    default_strength = 0.3
    max_tokens = 77
    paddings = ("max",)  # the UNet attends to the padding: it has no mask
    cleans_captions = False
    needs_start = True
    margins = True
    index = {
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "requires_aesthetics_score": True,
        "force_zeros_for_empty_prompt": False,
    }
    published_configs = {
        "text_encoder": CLIP_BIG_G, "transformer": UNET, "vae": SDXL_VAE, "scheduler": EULER,
    }  # fmt: skip
    tiny_configs = {
        "text_encoder": CLIP_BIG_G
        | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
        | {"num_attention_heads": 2, "projection_dim": 24, "vocab_size": 640},
        "transformer": UNET
        | {"block_out_channels": [8, 16, 32, 32], "attention_head_dim": [1, 2, 4, 4]}
        | {"norm_num_groups": 4, "transformer_layers_per_block": 2, "cross_attention_dim": 32}
        | {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24 + 5 * 8}
        | {"sample_size": 16},
        "vae": SDXL_VAE
        | {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 1, "norm_num_groups": 8},
        "scheduler": EULER,
    }

    def mismatch(self, configs: Mapping[str, Config]) -> str:
        """Channels between text encoder and UNet, UNet and VAE."""
        text, unet, vae = (configs[role] for role in ("text_encoder", "transformer", "vae"))
        made, taken = text.get("hidden_size"), unet.get("cross_attention_dim")
        if made != taken:
            return f"the text encoder makes {made} channels, and the UNet takes {taken}"
        made, taken = unet.get("in_channels"), vae.get("latent_channels")
        return "" if made == taken else f"the UNet makes {made} channels, and the VAE takes {taken}"

    def text_channels(self, transformer: Config) -> int:
        """Of its cross-attention."""
        return int(transformer["cross_attention_dim"])

    def clean(self, text: str, clean_caption: bool) -> str:
        """As it is: the tokenizer lower-cases it, and the pipeline does nothing else."""
        return text

    def encode(
        self, text_encoder: "nn.Module", ids: "Tensor", mask: "Tensor"
    ) -> "dict[str, Tensor]":
        """CLIP's last hidden state but one, `[batch, tokens, 1280]`, and its projected pooled
        output, `[batch, 1280]`. The padding is encoded like text: the pipeline gives no mask.
        """
        layers = len(list(text_encoder.get_submodule(_CLIP_LAYERS).children()))
        # Only that one is kept; a library that cannot choose gives all of them, in the same places.
        made = text_encoder(ids, output_hidden_states=[layers - 1])
        return {"prompt_embeds": made.hidden_states[-2], "pooled_prompt_embeds": made.text_embeds}

    def picture_conditions(
        self, rendered: Size, aesthetic_scores: Sequence[float]
    ) -> "tuple[dict[str, Tensor], dict[str, Tensor]]":
        """Original height and width in px, where a crop began (nowhere), aesthetic score: `[5]`."""
        import torch

        with_prompt, with_negative = (
            {"time_ids": torch.tensor([rendered.height, rendered.width, 0.0, 0.0, score])}
            for score in aesthetic_scores
        )
        return with_prompt, with_negative

    def conditions(
        self, positive: list[dict[str, "Tensor"]], negative: list[dict[str, "Tensor"]]
    ) -> dict[str, "Tensor"]:
        """All texts have the same number of tokens."""
        import torch

        texts = negative + positive
        return {name: torch.stack([text[name] for text in texts]) for name in positive[0]}

    def predict(
        self,
        transformer: "nn.Module",
        latents: "Tensor",
        timestep: "Tensor",
        conditions: Mapping[str, "Tensor"],
        guidance_scale: float,
    ) -> "Tensor":
        """With guidance. The pipeline's latents have their channels last in memory, as its VAE's
        encoder leaves them, and a CPU sums convolutions of such in another order.
        """
        import torch

        guided = guidance_scale > 1
        latents = latents.contiguous(memory_format=torch.channels_last)
        predicted: Tensor = transformer(
            torch.cat([latents, latents]) if guided else latents,
            timestep,
            encoder_hidden_states=conditions["prompt_embeds"],
            added_cond_kwargs={
                "text_embeds": conditions["pooled_prompt_embeds"],
                "time_ids": conditions["time_ids"],
            },
            return_dict=False,
        )[0]
        if guided:
            without, towards = predicted.chunk(2)
            predicted = guide(without, towards, guidance_scale)
        return predicted

    def unscale(self, latents: "Tensor", vae: Config) -> "Tensor":
        """Divided by the VAE's scaling factor; channels last in memory, see `predict`."""
        import torch

        unscaled = latents / scaling_factor(vae)
        return unscaled.contiguous(memory_format=torch.channels_last)

    def scale(self, latents: "Tensor", vae: Config) -> "Tensor":
        """Times the VAE's scaling factor."""
        return latents * scaling_factor(vae)

    def size_like(self, configs: Mapping[str, Config], picture: Size, binning: bool) -> Size:
        """The picture's own: it is refined, not made anew."""
        return picture

    def render_size(
        self, configs: Mapping[str, Config], size: Size | None, binning: bool
    ) -> tuple[Size, Size]:
        """Any size: what is no multiple of 8 px is computed up to the next."""
        side = int(configs["transformer"]["sample_size"]) * _PIXELS_PER_CELL
        asked = size or Size(side, side)
        if not all(MIN_SIDE <= each <= MAX_SIDE for each in (asked.width, asked.height)):
            raise RequestError(
                f"size {asked} is out of range: each side must be {MIN_SIDE} to {MAX_SIDE} px"
            )
        width, height = (-(-each // _PIXELS_PER_CELL) for each in (asked.width, asked.height))
        return asked, Size(width * _PIXELS_PER_CELL, height * _PIXELS_PER_CELL)

    def latent_shape(self, configs: Mapping[str, Config], rendered: Size) -> tuple[int, int, int]:
        """A cell for each 8 x 8 px."""
        channels = int(configs["transformer"]["in_channels"])
        return channels, rendered.height // _PIXELS_PER_CELL, rendered.width // _PIXELS_PER_CELL


FAMILY = SdxlRefiner()
