"""What was foretold against what the CPU's own allocator gave: sizes x strategies x batch.

    python benchmarks/prediction.py

Each case is a stage of the product, in this process, on the demo model or on a mid-size checkpoint
with random weights (T5 of 6 layers x 512, PixArt of 6 x 576, an SDXL VAE of a quarter of its
channels). Measured is the peak of torch's CPU allocator, from the profiler's record of every
allocation and of every thread, while the stage computes, beside the weights that it holds.
Results go to `benchmarks/results/prediction.json`; the last line on stdout is one compact
JSON.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

import lowvram  # noqa: E402
from benchmarks.machine import recorded, save  # noqa: E402
from lowvram import component  # noqa: E402
from lowvram.families.pixart import FAMILY, SDXL_VAE, T5_XXL, XL_2  # noqa: E402
from lowvram.stages.options import transformer  # noqa: E402
from lowvram.stages.savings import LADDER  # noqa: E402
from scripts.make_checkpoint import make_checkpoint  # noqa: E402

PROMPT = "a large blue star on a yellow background"
MID = {
    "text_encoder": T5_XXL
    | {"d_model": 512, "d_ff": 1280, "num_heads": 8, "num_layers": 6, "vocab_size": 512},
    "transformer": XL_2
    | {"num_layers": 6, "num_attention_heads": 8, "cross_attention_dim": 576}
    | {"caption_channels": 512, "sample_size": 64, "interpolation_scale": 1},
    "vae": SDXL_VAE | {"block_out_channels": [32, 64, 128, 128]},
    "scheduler": FAMILY.tiny_configs["scheduler"],
}


def main() -> int:
    """Return 1 where a case took more than 1 % over what was foretold."""
    parser = argparse.ArgumentParser(description="Compare foretold with measured peaks.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".checkpoints", help="%(default)s")
    folder, about = parser.parse_args().folder, recorded()
    with mock.patch.object(type(FAMILY), "tiny_configs", MID):
        make_checkpoint(folder / "mid", shard="20MB")
    work = folder / "prediction"
    work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for model, sizes in (("demo", ((128, 128), (192, 128))), ("mid", ((256, 256), (384, 256)))):
        name = "demo" if model == "demo" else str(folder / "mid")
        rows += [{"model": model, **row} for row in cases(name, sizes, work)]
    for row in rows:
        row["error"] = row["measured_bytes"] / row["foretold_bytes"] - 1
    save("prediction", {"benchmark": "prediction", **about, "rows": rows})
    errors = sorted(row["error"] for row in rows)
    brief = {"benchmark": "prediction", "cases": len(rows), "least": errors[0], "most": errors[-1]}
    print(json.dumps(brief, separators=(",", ":")))
    return int(errors[-1] > 0.01)


def cases(model: str, sizes: tuple[tuple[int, int], ...], work: Path) -> Iterator[dict[str, Any]]:
    """Every case of a model."""
    embeds, latents = work / "x.embeds.safetensors", work / "x.latents.safetensors"
    for weights in ("8bit", "4bit", "whole", "stream"):
        for padding in ("max", "none"):
            with measured("encode", f"{weights}, padding {padding}") as row:
                made = lowvram.encode(
                    [PROMPT, "a red heart"],
                    model,
                    output=embeds,
                    weights=weights,
                    padding=padding,
                    cache=False,
                )
                row["report"] = made.report
            yield finished(row)
    for size in sizes:
        for weights in ("whole", "stream"):
            for batch, guidance, savings in (
                *((1, 4.5, each) for each in LADDER),
                (3, 4.5, LADDER[0]),
                (3, 1.0, LADDER[0]),
            ):
                says = f"{weights}, {savings}, batch {batch}, guidance {guidance:g}"
                with (
                    mock.patch.object(transformer, "LADDER", (savings,)),
                    measured("denoise", f"{size[0]}x{size[1]}, {says}") as row,
                ):
                    made = lowvram.denoise(
                        embeds,
                        output=latents,
                        seed=list(range(3)),
                        steps=2,
                        size=size,
                        binning=False,
                        weights=weights,
                        guidance_scale=guidance,
                        batch_size=batch,
                    )
                    row["report"] = made.report
                yield finished(row)
        for pixels in ("whole", "strips", "blended"):
            for batch in (1, 3):
                with measured("decode", f"{size[0]}x{size[1]}, {pixels}, batch {batch}") as row:
                    made = lowvram.decode(
                        latents, output=work / "x.png", decode=pixels, batch_size=batch
                    )
                    row["report"] = made.report
                yield finished(row)


@contextmanager
def measured(stage: str, case: str) -> Iterator[dict[str, Any]]:
    """What the allocator gives while the stage computes goes into the row."""
    row: dict[str, Any] = {"stage": stage, "case": case}

    @contextmanager
    def recorded(device: Any, room: Any, weights: int) -> Iterator[None]:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            yield
        row["measured_bytes"] = weights + peak(record)

    with mock.patch.object(component, "tracked", recorded):
        yield row
    print(f"{stage}: {case}", file=sys.stderr, flush=True)


def peak(record: profile) -> int:
    """The largest sum of what is allocated at once."""
    assert record.profiler is not None
    events = [
        event
        for event in record.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def finished(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what its stage had foretold."""
    foretold = row.pop("report").predicted
    return {**row, "foretold_bytes": foretold["peak_allocated_bytes"]}


if __name__ == "__main__":
    sys.exit(main())
