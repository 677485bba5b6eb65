"""Whether negative prompts, which encode is asked for, go with the guidance of denoise."""

from lowvram.errors import RequestError
from lowvram.request.denoise import DenoiseTask
from lowvram.request.encode import EncodeTask


def check_negatives(encode: EncodeTask, denoise: DenoiseTask) -> None:
    """What one stage is asked for and the other makes void.

    Raises:
        RequestError: a negative prompt without guidance; guidance without negative embeddings.
    """
    scale = denoise.guidance_scale
    given = encode.embeds
    if scale > 1 and given and not _has_negative(given):
        raise RequestError(
            f"--embeds {given} has no negative_prompt_embeds, which guidance needs: "
            "use --guidance 1, or give them too"
        )
    if scale <= 1 and any(text.strip() for text in encode.negative_prompts):
        raise RequestError(
            f"--negative has no effect with --guidance {scale:g}, which turns guidance off: "
            "leave it out, or use a guidance above 1"
        )


def _has_negative(embeds: str) -> bool:
    """Whether a file has embeddings of negative prompts. The stage refuses one that has none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(embeds, framework="numpy") as file:
            names = set(file.keys())
    except (OSError, SafetensorError):
        return True
    return "prompt_embeds" not in names or "negative_prompt_embeds" in names
