"""`enable_model_cpu_offload`: each component on the device while it is used, whole.

With `-tiling` or `-slicing` the VAE decodes in tiles, or picture by picture. The first is a silent
no-op up to the VAE's own `sample_size` in px; the second changes nothing for a single picture.
"""

from benchmarks.baselines.measure import Stages
from benchmarks.baselines.pipelines import load, make_pictures
from benchmarks.baselines.request import Request


def run(request: Request, stages: Stages) -> None:
    """Load in the memory of the host, hook, make the pictures."""
    stages.enter("encode")
    pipe = load(request)
    pipe.enable_model_cpu_offload(device=request.device)
    if request.contender.endswith("-tiling"):
        pipe.vae.enable_tiling()
    elif request.contender.endswith("-slicing"):
        pipe.vae.enable_slicing()
    make_pictures(pipe, request, stages)
