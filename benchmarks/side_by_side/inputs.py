"""Files that a stage starts from when it runs alone: made once, of random numbers."""

import json
from pathlib import Path

TOKENS = 21  # of a prompt of a dozen words; the empty text has one

# What a picture's record takes from the settings of denoise, for latents that none has made.
_SETTINGS = {"timesteps": [], "sigmas": [], "steps": 1, "scheduler": "none", "guidance_scale": 1.0}


def embeddings(folder: Path, model: Path) -> Path:
    """Embeddings as `lowvram encode --embeds` takes them from elsewhere: no text encoder is needed.

    Args:
        folder: the file goes there, and is left if it is there already.
    """
    import torch
    from safetensors.torch import save_file

    import lowvram

    output = folder / f"{model.name}.embeds.safetensors"
    if output.is_file():
        return output
    config = json.loads((model / "transformer" / "config.json").read_text(encoding="utf-8"))
    drawn = torch.Generator().manual_seed(1)
    tensors = {}
    for prefix, tokens in (("", TOKENS), ("negative_", 1)):
        shape = (1, tokens, config["caption_channels"])
        tensors[f"{prefix}prompt_embeds"] = torch.randn(shape, generator=drawn)
        tensors[f"{prefix}prompt_attention_mask"] = torch.ones(1, tokens, dtype=torch.int64)
    given = folder / f"{model.name}.given.safetensors"
    save_file(tensors, given)
    lowvram.encode(["random"], str(model), output=output, embeds=given, device="cpu")
    return output


def noise(folder: Path, side: int) -> Path:
    """`latents` [1, 4, side/8, side/8], float32, of normal numbers.

    Args:
        side: of the picture, px.
    """
    import numpy as np
    from safetensors.numpy import save_file

    path = folder / f"noise-{side}.safetensors"
    if not path.is_file():
        drawn = np.random.default_rng(0).standard_normal((1, 4, side // 8, side // 8))
        save_file({"latents": drawn.astype(np.float32)}, path)
    return path


def latents(folder: Path, model: Path, side: int) -> Path:
    """The same as `lowvram denoise` would have written it."""
    path = folder / f"noise-{side}-{model.name}.latents.safetensors"
    return path if path.is_file() else finished(noise(folder, side), model, path)


def finished(plain: Path, model: Path, path: Path) -> Path:
    """An artifact of finished latents.

    Args:
        plain: a safetensors file with `latents` [pictures, 4, height/8, width/8].
        path: of the artifact, which is returned.
    """
    from safetensors.torch import load_file

    from lowvram import artifacts
    from lowvram.swaps import resolve_with

    tensors = {"latents": load_file(plain)["latents"]}
    count, _, height, width = tensors["latents"].shape
    header = artifacts.Header(
        kind="latents",
        model=resolve_with(str(model)).record(),
        settings=_SETTINGS | {"requested": [8 * width, 8 * height]},
        items=[
            {"prompt": "", "negative_prompt": "", "prompt_index": index, "seed": 0}
            for index in range(count)
        ],
    )
    artifacts.write(path, header, tensors)
    return path
