"""A checkpoint of true size with random weights, written as fast as the disk takes it.

`scripts/make_checkpoint.py` draws each value: minutes for 22 GB. Here one tile of normal numbers
is repeated, from another place for each tensor, by as many threads as there are cores. Values are
scaled as that script does, so that activations stay finite in float16 and bfloat16; the
transformer's last layer is weaker still, or latents grow to hundreds and the VAE's maps to half of
what float16 holds. Shapes, names, sharding and tokenizer are that script's. The tile's length is
prime, so that no two rows of a matrix are alike; the text encoder comes in two files, as in the
published 1024 px repository.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.side_by_side.places import place
from lowvram.weights.tensor_files import Spec, header
from scripts.make_checkpoint import DTYPES, Draw, make_checkpoint

_TILE = 16_777_213  # numbers: 64 MiB of float32, and a prime
_WEAKER = {"proj_out.weight": 0.3}
_CELLS_OF_SCALE_1 = 64  # `interpolation_scale` is 0.5, 1, 2, 4 for 256, 512, 1024, 2048 px


def make(folder: Path, size: str, sides: tuple[int, ...], base: int) -> None:
    """The checkpoint `folder/sigma-BASE`, and beside it one for each other side, of links.

    Args:
        size: "published" or "tiny".
        sides: px of the pictures; a multiple of 8.
        base: the side whose files are written.
    """
    torch.set_num_threads(1)  # each writer is a thread already
    cells = base // 8
    whole = place(folder, base)
    make_checkpoint(whole, size, sample_size=cells, shard="10GB", write_weights=write_tiled)
    for side in sides:
        if side != base:
            _link(whole, place(folder, side), side // 8)


def main(arguments: Sequence[str]) -> int:
    """`python -m benchmarks.side_by_side.checkpoint FOLDER SIZE BASE SIDE...`"""
    folder, size, base, *sides = arguments
    make(Path(folder), size, tuple(map(int, sides)), int(base))
    return 0


def write_tiled(path: Path, draws: Mapping[str, Draw], dtype: str, seed: str) -> int:
    """Write a safetensors file in parallel; its bytes. Not synced: who reads cold has to."""
    kind, tile = DTYPES[dtype], _tile()
    specs = [Spec(name, kind, tuple(draw.tensor.shape)) for name, draw in draws.items()]
    start = len(head := header(specs))
    pieces = []
    for spec, draw in zip(specs, draws.values(), strict=True):
        digest = hashlib.sha256(f"{seed} {spec.name}".encode()).digest()
        first = int.from_bytes(digest[:8], "little") % _TILE
        count, done = draw.tensor.numel(), 0
        while done < count:
            part = min(_TILE - first, count - done)
            scale = draw.deviation * _WEAKER.get(spec.name, 1.0)
            pieces.append((start + done * kind.itemsize, first, part, scale, draw.mean))
            done, first = done + part, 0
        start += spec.bytes
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.pwrite(descriptor, head, 0)

        def write(piece: tuple[int, int, int, float, float]) -> None:
            at, first, part, scale, mean = piece
            values = tile[first : first + part] * scale + mean
            _pwrite(descriptor, values.to(kind), at)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(write, pieces))
    finally:
        os.close(descriptor)
    return path.stat().st_size


def _tile() -> Tensor:
    return torch.empty(_TILE).normal_(generator=torch.Generator().manual_seed(0))


def _pwrite(descriptor: int, values: Tensor, at: int) -> None:
    left = memoryview(values.view(torch.uint8).numpy().data)
    while left:
        written = os.pwrite(descriptor, left, at)
        left, at = left[written:], at + written


def _link(whole: Path, folder: Path, cells: int) -> None:
    """The same weights for pictures of another side, whose transformer differs in two settings."""
    folder.mkdir(exist_ok=True)
    for part in whole.iterdir():
        if part.name.startswith("."):
            continue
        target = folder / part.name
        if part.name != "transformer":
            if not target.exists():
                target.symlink_to(part.resolve(), target_is_directory=part.is_dir())
            continue
        target.mkdir(exist_ok=True)
        for file in part.iterdir():
            if file.name != "config.json" and not (target / file.name).exists():
                (target / file.name).symlink_to(file.resolve())
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
        config |= {"sample_size": cells, "interpolation_scale": cells / _CELLS_OF_SCALE_1}
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
