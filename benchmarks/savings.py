"""What the exact savings of a denoising step hold and compute: PixArt XL/2 in float16, counted.

    python benchmarks/savings.py

On fake tensors, no weights and no GPU: the peak of activations at each size for each step of the
ladder, whole and streamed (where the other branch waits at the door of a block); and which part of
a step's multiplications is the caption projection and the keys and values of the text, which do
not change between steps. The last line is one compact JSON, which also goes to
`benchmarks/results/savings.json`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

from benchmarks.machine import recorded, save  # noqa: E402
from lowvram.families.pixart import FAMILY  # noqa: E402
from lowvram.memory.predict import Work, trace, without_storage  # noqa: E402
from lowvram.stages.options.transformer import Steps, step_once  # noqa: E402
from lowvram.stages.savings import LADDER, Savings  # noqa: E402
from lowvram.weights.checkpoint import build, find_class  # noqa: E402

COMPONENT = FAMILY.component("transformer")
SIDES = (256, 512, 1024, 2048, 4096)
TOKENS = 27  # of the longest text


def main() -> int:
    """Count, print, write."""
    document: dict[str, Any] = {"benchmark": "savings", **recorded()}
    document |= {"dtype": "float16", "tokens": TOKENS}
    network = without_storage(make)
    document["peak_bytes"] = {
        side: {
            f"{savings}, {name}": trace(
                network, step(savings, side, TOKENS, blocks), COMPONENT.blocks
            ).activations
            for savings in LADDER
            for name, blocks in (("whole", ""), ("streamed", COMPONENT.blocks))
        }
        for side in SIDES
    }
    document["text_part_of_multiplications"] = {
        f"{side} px, {tokens} tokens": text_part(network, side, tokens)
        for side in (512, 1024)
        for tokens in (TOKENS, 300)
    }
    save("savings", document)
    print(json.dumps(document, separators=(",", ":")))
    return 0


def make() -> nn.Module:
    """The true network, on the default device."""
    config = FAMILY.published_configs["transformer"]
    return build(find_class(COMPONENT.class_name), config, torch.float16)


def step(savings: Savings, side: int, tokens: int, blocks: str) -> Work:
    """A guided step for one picture, as the stage makes it."""
    text = {
        "prompt_embeds": torch.empty(tokens, 4096, device="meta"),
        "prompt_attention_mask": torch.empty(tokens, dtype=torch.long, device="meta"),
    }
    return step_once(FAMILY, savings, Steps((1, 4, side // 8, side // 8), text, True, 1), blocks)


def text_part(network: nn.Module, side: int, tokens: int) -> float:
    """Multiplications of what depends on the text alone, of all in a step."""
    parts: dict[str, dict[Any, int]] = {}

    def work(fake: nn.Module, device: torch.device) -> None:
        counter = FlopCounterMode(display=False)
        with counter:
            step(Savings(), side, tokens, "")(fake, device)
        parts.update(counter.get_flop_counts())

    trace(network, work)
    ends = ("caption_projection", "attn2.to_k", "attn2.to_v")
    own = sum(sum(n.values()) for name, n in parts.items() if name.endswith(ends))
    return own / sum(parts["Global"].values())


if __name__ == "__main__":
    sys.exit(main())
