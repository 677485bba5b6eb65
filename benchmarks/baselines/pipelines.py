"""A whole diffusers pipeline, asked for one picture after another, with its stages told apart.

Nothing is changed in how it works: where the text is encoded and where decoding begins is seen by
wrapping two of its functions, and the latents by its own callback.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.baselines.measure import Stages
from benchmarks.baselines.request import SAME_FOR_ALL, Request


def load(request: Request, **components: Any) -> Any:
    """PixArtSigmaPipeline as `from_pretrained` gives it; for finished latents the VAE alone.

    Args:
        components: passed on; None for one that shall not be loaded.
    """
    from diffusers import PixArtSigmaPipeline

    if request.latents is not None:
        components |= {"text_encoder": None, "transformer": None}
    pipe = PixArtSigmaPipeline.from_pretrained(
        request.model, dtype=request.torch_dtype, local_files_only=True, **components
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pictures(
    pipe: Any,
    request: Request,
    stages: Stages,
    texts: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write a picture for each prompt, or decode the finished latents.

    Args:
        texts: embeddings by the names of the pipeline's arguments; None to encode the prompts.
    """
    if request.latents is not None:
        decode_latents(pipe, request, stages)
        return
    _tell_stages(pipe, stages)
    kept: list[torch.Tensor] = []

    def keep(step: int, timestep: int, latents: torch.Tensor) -> None:
        if step == request.steps - 1:
            kept.append(latents.cpu())

    for index, text in enumerate(texts or [{"prompt": each} for each in request.prompts]):
        stages.enter("encode")
        image = pipe(
            **text,
            num_inference_steps=request.steps,
            height=request.size,
            width=request.size,
            latents=request.noise(),
            callback=keep,
            **SAME_FOR_ALL,
        ).images[0]
        image.save(request.picture(index))
    save_latents(request, kept)


def decode_latents(pipe: Any, request: Request, stages: Stages) -> None:
    """Decode finished latents, as the pipeline does after its last step, and nothing else."""
    stages.enter("decode")
    assert request.latents is not None
    latents = load_file(request.latents)["latents"].to(request.device, request.torch_dtype)
    save_picture(pipe, latents, request.picture(0))


def save_picture(pipe: Any, latents: torch.Tensor, path: Path) -> None:
    """Decode latents `[1, 4, size/8, size/8]` as the pipeline's last lines do, into a file."""
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    image = pipe.image_processor.postprocess(decoded, output_type="pil")[0]
    image.save(path)


def save_latents(request: Request, latents: list[torch.Tensor]) -> None:
    """Keep the latents `[prompts, 4, size/8, size/8]` for comparison.

    Raises:
        ValueError: NaN or infinity among them: there is nothing to compare.
    """
    together = torch.cat(latents).cpu().contiguous()
    if not together.isfinite().all():
        raise ValueError("NaN or infinity in the latents")
    save_file({"latents": together}, request.output / "latents.safetensors")


def _tell_stages(pipe: Any, stages: Stages) -> None:
    encode_prompt, decode = pipe.encode_prompt, pipe.vae.decode

    def encoding(*arguments: Any, **options: Any) -> Any:
        made = encode_prompt(*arguments, **options)
        stages.enter("denoise")
        return made

    def decoding(*arguments: Any, **options: Any) -> Any:
        stages.enter("decode")
        return decode(*arguments, **options)

    pipe.encode_prompt, pipe.vae.decode = encoding, decoding
