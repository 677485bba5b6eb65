"""What lowvram computes in half precision, by diffusers' pipeline alone: T5 in bfloat16, where
float16 overflows with the published weights, and the transformer and the VAE in float16.

Not a way that people use, but what lowvram's output is held against on a GPU.
"""

import gc

import torch

from benchmarks.baselines.measure import Stages
from benchmarks.baselines.pipelines import decode_latents, load, make_pictures
from benchmarks.baselines.request import Request


def run(request: Request, stages: Stages) -> None:
    """Encode with T5 alone; then the rest of the pipeline, given the embeddings."""
    stages.enter("encode")
    if request.latents is not None:
        decode_latents(load(request).to(request.device), request, stages)
        return
    pipe = load(request, transformer=None, text_encoder=_text_encoder(request))
    pipe.text_encoder.to(request.device)
    with torch.no_grad():
        encoded = [pipe.encode_prompt(p, device=request.device) for p in request.prompts]
    del pipe
    gc.collect()
    pipe = load(request, text_encoder=None).to(request.device)
    make_pictures(pipe, request, stages, [_given(each, request) for each in encoded])


def _text_encoder(request: Request) -> torch.nn.Module:
    from transformers import T5EncoderModel

    dtype = torch.bfloat16 if request.dtype == "fp16" else request.torch_dtype
    model: torch.nn.Module = T5EncoderModel.from_pretrained(
        request.model, subfolder="text_encoder", dtype=dtype, local_files_only=True
    )
    return model


def _given(encoded: tuple[torch.Tensor, ...], request: Request) -> dict[str, torch.Tensor | None]:
    """What `encode_prompt` returned as the arguments of the pipeline, in its own dtype."""
    embeds, mask, negative, negative_mask = encoded
    return {
        "negative_prompt": None,
        "prompt_embeds": embeds.to(request.torch_dtype),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": negative.to(request.torch_dtype),
        "negative_prompt_attention_mask": negative_mask,
    }
