"""The rows of each part, the most telling first. What `--quick` leaves out comes last."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.baselines.contenders import CONTENDERS
from benchmarks.side_by_side.rows import GIB, Plan

SIDES = (512, 1024, 2048, 4096)  # px; the last is decoded only: no checkpoint is published for it
CAP = 8 * GIB  # the card that the published recipe is for
_STRETCH = (270_000_000, 3 * GIB // 10)  # of a stage's tensors: the stretch goal, and some more
_FEW = 2  # steps where only memory is looked at, which is the same in each
_PCIE_3X8 = 7.9e9  # bytes a second: 8 lanes of 8 GT/s, 128 of 130 bits
_DISKS = (3.5e9, 0.5e9)  # bytes a second: an NVMe on PCIe 3 x4, a SATA disk
# What one block takes with guidance at 1024 px: 67 ms on an RTX 3050 of a laptop, 31 ms on an RTX
# 3060, computed from their published rates and not measured.
_BLOCK_SECONDS = (0.031, 0.067)


def first(px: Callable[[int], int], quick: bool) -> list[Plan]:
    """From the command to the first picture."""
    row = Plan("first", "", px(1024), cache="warm")
    small, free = replace(row, contender="lowvram", budget=GIB), replace(row, contender="lowvram")
    recipe = replace(row, contender="published-8bit")
    offload = replace(row, contender="model-offload")
    # The reference before ours, which is held against it.
    rows = [replace(recipe, cache="cold"), replace(row, contender="reference")]
    rows += [replace(small, cache="cold"), small, offload]
    if quick:
        return rows
    rows += [free, recipe]
    rows += [replace(free, budget=size * GIB) for size in (8, 6, 4, 2)]
    rows += [replace(each, cache="cold") for each in (free, offload)]
    rows += [replace(row, contender="published-4bit")]
    rows += [replace(each, limit=CAP) for each in (recipe, offload)]
    return rows


def memory(px: Callable[[int], int], quick: bool) -> list[Plan]:
    """Peaks of each stage under a cap of 8 GiB; times are not taken."""
    row = Plan("memory", "", px(1024), steps=_FEW, timed=False)
    ours = replace(row, contender="lowvram")
    rows = [replace(row, contender="interpreter", size=0), replace(row, contender="reference")]
    rows += [replace(row, contender="published-8bit", limit=limit) for limit in (CAP, None)]
    rows += [replace(ours, budget=GIB), *(replace(ours, stage_budget=held) for held in _STRETCH)]
    rows += [replace(ours, budget=CAP)]
    rows += [
        replace(row, contender=name, limit=CAP)
        for name in ("published-4bit", "model-offload", "group-offload-block")
    ]
    for side in (2048,) if quick else (2048, 512):
        names = ("published-8bit", "model-offload-tiling") if quick else _ALL_BUT_LOWVRAM
        # Of 1.375 GiB a context of 0.79 GB leaves 0.68; 2048 px need 0.60 (foretold.json).
        rows += [replace(ours, size=px(side), budget=GIB if side == 512 else 11 * GIB // 8)]
        rows += [replace(row, contender=name, size=px(side), limit=CAP) for name in names]
    rows += [replace(ours, size=px(4096), steps=0, budget=2 * GIB)]
    for name in ("model-offload", "model-offload-tiling", "model-offload-slicing"):
        rows += [replace(row, contender=name, size=px(4096), steps=0, limit=CAP)]
    if quick:
        return rows
    rows += [replace(row, contender=name, limit=CAP) for name in _ALL_BUT_LOWVRAM]
    rows += [replace(ours, budget=None)]
    rows += [replace(ours, size=px(side), budget=2 * GIB) for side in (1024, 2048)]
    return list(dict.fromkeys(rows))


_ALL_BUT_LOWVRAM = tuple(n for n in CONTENDERS if n not in ("lowvram", "one-shot-fp32"))


def many(px: Callable[[int], int], quick: bool) -> list[Plan]:
    """Several prompts: what a further picture costs."""
    row = Plan("many", "lowvram", px(1024), prompts=10, cache="warm", budget=CAP)
    per_prompt = replace(row, contender="model-offload", budget=None)
    rows = [row, replace(per_prompt, prompts=4 if quick else 10)]
    if quick:
        return rows
    rows += [replace(row, prompts=1), replace(row, budget=None), replace(per_prompt, limit=CAP)]
    return [*rows, replace(row, prompts=100)]


def prepared(px: Callable[[int], int], quick: bool) -> list[Plan]:
    """`lowvram prepare`, and the first picture with what it wrote."""
    row = Plan("prepared", "lowvram", px(1024), cache="warm", also=("prepared",))
    made = replace(row, contender="prepare", also=(), size=0, cache="")
    rows = [made, replace(row, budget=GIB, cache="cold"), replace(row, budget=GIB)]
    return rows if quick else [*rows, row, replace(row, cache="cold"), replace(row, budget=CAP)]


def predicted(px: Callable[[int], int], quick: bool) -> list[Plan]:
    """One row for each stage and way of working: foretold against measured peaks."""
    row = Plan("predicted", "", px(1024), steps=5, timed=False)
    encoders = ["stream", "8bit", "whole", "4bit", "stream --stage-budget 0.25GiB"]
    transformers = ["stream", "whole"]
    # The goals, and one with room for what an allocator holds beyond: on the H100 it reserved 6 to
    # 8 MB more than foretold. foretold.json has 0.27 and 0.60 GB.
    least = ((1024, "0.27GB"), (1024, "0.3GiB"), (2048, "0.8GB"))
    rows = [replace(row, contender=f"decode --decode {way}") for way in ("strips", "whole")]
    rows += [replace(row, contender=f"denoise --weights {way}") for way in transformers]
    rows += [
        replace(row, contender=f"denoise --weights stream --stage-budget {held}", size=px(side))
        for side, held in least
    ]
    rows += [replace(row, contender=f"encode --weights {way}") for way in encoders]
    rows += [replace(row, contender="decode --decode strips --stage-budget 0.25GiB")]
    rows += [replace(row, contender="decode --decode strips", size=px(2048))]
    if quick:
        return rows
    rows += [replace(row, contender="decode --decode blended")]
    rows += [replace(row, contender=f"denoise --weights {w}", size=px(2048)) for w in transformers]
    return [*rows, replace(row, contender="decode --decode strips", size=px(4096))]


def streaming(px: Callable[[int], int], quick: bool) -> list[Plan]:
    """A step with weights that stream against one with weights that stay."""
    rows = []
    for side in (1024, 2048) if quick else (1024, 2048, 512):
        steps = 5 if side == 2048 else 10
        for way in ("whole", "stream"):
            rows.append(Plan("streaming", f"denoise --weights {way}", px(side), steps=steps))
    return rows


def throttled(px: Callable[[int], int], quick: bool) -> list[Plan]:
    """The same over a narrow bus, with slow blocks too; and T5 from slow disks."""
    rows = []
    for seconds in _BLOCK_SECONDS if quick else (*_BLOCK_SECONDS, None):
        slow = () if seconds is None else (f"block {seconds:g} s",)
        for way, narrow in (("whole", ()), ("stream", (f"bus {_PCIE_3X8:g} B per s",))):
            row = Plan("throttled", f"denoise --weights {way}", px(1024), steps=5)
            rows.append(replace(row, also=(*narrow, *slow)))
    row = Plan("throttled", "encode --weights stream", px(1024), steps=0)
    disks = [replace(row, also=(f"disk {rate:g} B per s",)) for rate in _DISKS]
    return [*rows, *disks[: 1 if quick else 2]]


PARTS: dict[str, Callable[[Callable[[int], int], bool], Sequence[Plan]]] = {
    "first": first,
    "many": many,
    "streaming": streaming,
    "throttled": throttled,
    "prepared": prepared,
    "memory": memory,
    "predicted": predicted,
}
