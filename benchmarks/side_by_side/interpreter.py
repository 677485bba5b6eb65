"""What a process takes before it holds a weight: `python -m benchmarks.side_by_side.interpreter`.

Libraries and networks' classes are imported; on a GPU there is a context, and one product and one
convolution have loaded the kernels' libraries. Peaks of contenders are told above this one's.
Prints one line of JSON, as a contender does.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Always 0."""
    parser = argparse.ArgumentParser(prog="interpreter", description="A process without weights.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    name = parser.parse_args(arguments).device
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    import torch
    from diffusers import AutoencoderKL, PixArtTransformer2DModel  # noqa: F401
    from transformers import T5EncoderModel, T5Tokenizer  # noqa: F401

    from benchmarks.baselines.measure import Stages

    stages = Stages(torch.device(name))
    stages.enter("all")
    dtype = torch.float16 if name == "cuda" else torch.float32
    some = torch.ones(1, 8, 32, 32, device=name, dtype=dtype)
    torch.nn.functional.conv2d(some, torch.ones(8, 8, 3, 3, device=name, dtype=dtype), padding=1)
    torch.mm(some[0, 0], some[0, 1])
    rows = stages.close()
    answer.write(json.dumps({"ok": True, "error": None, "stages": rows}) + "\n")
    answer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
