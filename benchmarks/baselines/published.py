"""The three steps of diffusers' page "Running the PixArtSigmaPipeline in under 8GB GPU VRAM".

T5 in 8 bits (or in 4, which the page mentions no settings for) encodes and is deleted; a pipeline
without it makes latents in half precision; its transformer is deleted, and the VAE decodes.
What had to change for transformers 5 and diffusers 0.42, and nothing else:

- `load_in_8bit=True` is a TypeError now: `quantization_config=BitsAndBytesConfig(...)` has it.
- `dtype=torch.float16` is said: the transformers of that page filled it in by itself for 8 bits,
  today's would keep the file's float32 for what is not quantised, and take more.
- `torch_dtype=` is `dtype=`.
- Several prompts go through each of the three steps in a loop; the page has one.
- Text, noise and size as all contenders have them (`request.SAME_FOR_ALL`).
"""

import gc
from typing import Any

import torch

from benchmarks.baselines.measure import Stages
from benchmarks.baselines.pipelines import decode_latents, load, save_latents, save_picture
from benchmarks.baselines.request import SAME_FOR_ALL, Request

_OF_ENCODING = ("clean_caption",)


def run(request: Request, stages: Stages) -> None:
    """Encode, denoise, decode."""
    if request.latents is not None:
        stages.enter("decode")
        decode_latents(load(request).to(request.device), request, stages)
        return
    stages.enter("encode")
    embeds = _encode(request)
    stages.enter("denoise")
    pipe = load(request, text_encoder=None).to(request.device)
    latents = [_denoise(pipe, each, request) for each in embeds]
    stages.enter("decode")
    del pipe.transformer
    _flush()
    for index, each in enumerate(latents):
        save_picture(pipe, each, request.picture(index))
    save_latents(request, latents)


def _encode(request: Request) -> list[tuple[torch.Tensor, ...]]:
    """For each prompt: its embeddings and mask, those of the empty text and their mask."""
    from diffusers import PixArtSigmaPipeline
    from transformers import BitsAndBytesConfig, T5EncoderModel

    bits = "load_in_8bit" if request.contender.endswith("-8bit") else "load_in_4bit"
    text_encoder = T5EncoderModel.from_pretrained(
        request.model,
        subfolder="text_encoder",
        quantization_config=BitsAndBytesConfig(**{bits: True}),
        device_map="auto",
        dtype=torch.float16,
        local_files_only=True,
    )
    pipe = PixArtSigmaPipeline.from_pretrained(
        request.model,
        text_encoder=text_encoder,
        transformer=None,
        device_map="balanced",
        local_files_only=True,
    )
    of_encoding = {name: SAME_FOR_ALL[name] for name in _OF_ENCODING}
    with torch.no_grad():
        embeds = [pipe.encode_prompt(prompt, **of_encoding) for prompt in request.prompts]
    del text_encoder
    del pipe
    _flush()
    return embeds


def _denoise(pipe: Any, embeds: tuple[torch.Tensor, ...], request: Request) -> torch.Tensor:
    """Latents `[1, 4, size/8, size/8]` of one prompt."""
    prompt_embeds, prompt_mask, negative_embeds, negative_mask = embeds
    latents: torch.Tensor = pipe(
        negative_prompt=None,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_embeds,
        prompt_attention_mask=prompt_mask,
        negative_prompt_attention_mask=negative_mask,
        num_images_per_prompt=1,
        output_type="latent",
        num_inference_steps=request.steps,
        height=request.size,
        width=request.size,
        latents=request.noise(),
        **SAME_FOR_ALL,
    ).images
    return latents


def _flush() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
