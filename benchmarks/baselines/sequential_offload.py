"""`enable_sequential_cpu_offload`: each single layer on the device while it is used."""

from benchmarks.baselines.measure import Stages
from benchmarks.baselines.pipelines import load, make_pictures
from benchmarks.baselines.request import Request


def run(request: Request, stages: Stages) -> None:
    """Load in the memory of the host, hook, make the pictures."""
    stages.enter("encode")
    pipe = load(request)
    pipe.enable_sequential_cpu_offload(device=request.device)
    make_pictures(pipe, request, stages)
