"""Train the demo model from nothing and export it to `lowvram/demo/model/`.

    python scripts/train_demo.py                            # one CUDA GPU: 9 minutes of training
    torchrun --nproc-per-node 2 scripts/train_demo.py       # two CPU cores: 11 hours

draws its own pictures and needs no download. Stages: tokenizer, text encoder, VAE, denoiser. Each
leaves its result in `.demo-training/`, so a stopped run goes on where it was; `log.jsonl` there has
every figure. A usable folder is exported at each look at the denoiser. `--until vae` stops early,
`--seconds denoiser=300` gives a stage another time limit, and `--pretrained MODEL` goes on from an
exported model: its denoiser alone, at a quarter of the rates.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed as dist
from transformers import T5Tokenizer

from lowvram.demo import corpus, networks
from lowvram.demo.corpus import Corpus
from lowvram.demo.denoiser_stage import train_denoiser
from lowvram.demo.scenes import CANVASES
from lowvram.demo.text_stage import train_text
from lowvram.demo.training import Log, Plan, device, wait_for_all, worker
from lowvram.demo.vae_stage import train_vae

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = REPOSITORY / "lowvram" / "demo" / "model"

STAGES = ("text", "vae", "denoiser")
PLANS = {  # batch, steps, seconds, peak learning rates, averaging, steps between looks
    "cuda": (
        Plan("text", 512, 1000, 60, {"encoder": 2e-3, "readers": 2e-3}, 0.99, 500),
        Plan("vae", 256, 8000, 150, {"vae": 2e-3}, 0.998, 1000),
        Plan("denoiser", 512, 20000, 330, {"transformer": 1.2e-3, "text": 1e-4}, 0.999, 1500),
    ),
    "cpu": (
        Plan("text", 64, 1600, 600, {"encoder": 2e-3, "readers": 2e-3}, 0.99, 200),
        Plan("vae", 8, 12000, 3600, {"vae": 2e-3}, 0.995, 250),
        Plan("denoiser", 64, 40000, 36000, {"transformer": 1.2e-3, "text": 1e-4}, 0.998, 250),
    ),
}
SCENES = {"cuda": (200_000, 80_000, 80_000), "cpu": (40_000, 20_000, 20_000)}  # of each canvas
HELD_OUT = 512  # scenes of each canvas


def main() -> None:
    """Run all stages, or what is left of them."""
    options, plans = _parse()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    folder: Path = options.work
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder / "log.jsonl")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    tokenizer_folder = folder / "tokenizer"
    if options.pretrained:  # its own, whatever captions are like today
        tokenizer_folder = options.pretrained / "tokenizer"
    elif worker() == 0:
        networks.make_tokenizer(tokenizer_folder)
    wait_for_all()
    tokenizer = T5Tokenizer.from_pretrained(str(tokenizer_folder))
    seen, unseen = _corpora(tokenizer, options.scenes or SCENES[device().type])

    torch.manual_seed(0)
    if options.pretrained:
        text_encoder, transformer, vae = networks.imported(options.pretrained, device())
    else:
        text_encoder = train_text(plans["text"], folder, log, tokenizer, seen[0], unseen[0])
        if options.until == "text":
            return
        vae = train_vae(plans["vae"], folder, log, seen, unseen)
        if options.until == "vae":
            return
        transformer = networks.make_transformer().to(device())
    train_denoiser(
        plans["denoiser"], folder, log, tokenizer_folder, (text_encoder, transformer, vae), seen,
        unseen[0], options.model,
    )  # fmt: skip
    if worker() == 0:
        networks.export(options.model, tokenizer_folder, text_encoder, transformer, vae)


def _parse() -> tuple[argparse.Namespace, dict[str, Plan]]:
    """The command line, and the plan of each stage as it has it."""
    parser = argparse.ArgumentParser(description="Train the demo model from nothing.")
    parser.add_argument("--work", type=Path, default=REPOSITORY / ".demo-training")
    parser.add_argument("--model", type=Path, default=MODEL, help="where to export")
    parser.add_argument("--until", choices=STAGES, default="denoiser", help="the last stage")
    parser.add_argument(
        "--pretrained", type=Path, metavar="MODEL", help="exported; train on from it"
    )
    parser.add_argument("--seconds", nargs="*", default=[], metavar="STAGE=SECONDS")
    parser.add_argument("--scenes", type=int, nargs=3, help="how many of each canvas")
    options = parser.parse_args()
    limits = dict(pair.partition("=")[::2] for pair in options.seconds)
    if unknown := limits.keys() - set(STAGES):
        parser.error(f"--seconds: no stage {', '.join(unknown)}: use {', '.join(STAGES)}")
    if options.pretrained and options.until != "denoiser":
        parser.error(f"--pretrained trains the denoiser only: leave out --until {options.until}")
    if options.pretrained and (options.work / "denoiser.pt").exists():
        parser.error(f"{options.work} holds a finished denoiser: name another --work")
    plans = {plan.name: plan for plan in PLANS[device().type]}
    for name, seconds in limits.items():
        plans[name] = replace(plans[name], seconds=float(seconds))
    if options.pretrained:
        rates = {part: rate / 4 for part, rate in plans["denoiser"].rates.items()}
        plans["denoiser"] = replace(plans["denoiser"], rates=rates)
    return options, plans


def _corpora(tokenizer: T5Tokenizer, counts: Sequence[int]) -> tuple[list[Corpus], list[Corpus]]:
    """Scenes of each canvas to train on, and held-out ones, on the device."""
    seen = [corpus.make(tokenizer, n, c, False) for n, c in zip(counts, CANVASES, strict=True)]
    unseen = [corpus.make(tokenizer, HELD_OUT, canvas, held_out=True) for canvas in CANVASES]
    # Moved only now: making them forks, which has to come before CUDA starts.
    return [some.to(device()) for some in seen], [some.to(device()) for some in unseen]


if __name__ == "__main__":
    main()
