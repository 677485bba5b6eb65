"""The pipeline with every component on the device: what the shortest example does."""

from benchmarks.baselines.measure import Stages
from benchmarks.baselines.pipelines import load, make_pictures
from benchmarks.baselines.request import Request


def run(request: Request, stages: Stages) -> None:
    """Load, move to the device, make the pictures.

    `one-shot-fp32` is the same with `--dtype fp32`: what every other output is held against.
    """
    stages.enter("encode")
    pipe = load(request).to(request.device)
    make_pictures(pipe, request, stages)
