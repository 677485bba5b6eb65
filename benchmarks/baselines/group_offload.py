"""Group offloading, applied as diffusers' page on memory does, and applied right.

`group-offload-block`: the transformer by blocks with a copy stream (a stream needs one block a
group), the VAE by leaves, as that page shows. The text encoder goes by leaves too: T5EncoderModel
holds its blocks two levels down, where block level finds none and makes one group of all, which
saves nothing. `group-offload-leaf`: everything by leaves.
"""

import torch

from benchmarks.baselines.measure import Stages
from benchmarks.baselines.pipelines import load, make_pictures
from benchmarks.baselines.request import Request


def run(request: Request, stages: Stages) -> None:
    """Load in the memory of the host, hook, make the pictures."""
    from diffusers.hooks import apply_group_offloading

    stages.enter("encode")
    pipe = load(request)
    by_block = request.contender.endswith("-block")
    for name in ("text_encoder", "transformer", "vae"):
        component = getattr(pipe, name)
        if component is None:
            continue
        blocks = by_block and name == "transformer"
        apply_group_offloading(
            component,
            onload_device=torch.device(request.device),
            offload_device=torch.device("cpu"),
            offload_type="block_level" if blocks else "leaf_level",
            num_blocks_per_group=1 if blocks else None,
            use_stream=request.device == "cuda",
        )
    make_pictures(pipe, request, stages)
