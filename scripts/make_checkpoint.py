"""Write a checkpoint with random weights: the real classes and layout, of any true size.

    python scripts/make_checkpoint.py FOLDER --size published --dtype bfloat16

For tests (`--size tiny`) and for measuring memory and time without the published weights. Shapes
come from the real class built without memory; values are drawn and written piece by piece, so that
T5-XXL (19 GB in float32) is made in a few hundred MB of RAM. A tensor depends on the seed and its
name alone: not on the sharding, nor on what else is written.
"""

import argparse
import hashlib
import importlib
import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

from lowvram.errors import LowvramError, RequestError, translated  # noqa: E402
from lowvram.families import all_families  # noqa: E402
from lowvram.families.family import Component, Config, Family  # noqa: E402
from lowvram.weights.tensor_files import Spec, write_file  # noqa: E402
from scripts.make_tokenizers import write_tokenizer  # noqa: E402

WEIGHTED = ("text_encoder", "transformer", "vae")
SIZES = ("tiny", "published")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SETTINGS = ".make_checkpoint.json"  # what the folder was made with; empty until it is finished

_PIECE = 1 << 24  # numbers drawn at a time: 64 MiB of float32

log = logging.getLogger("make_checkpoint")


@dataclass(frozen=True)
class Draw:
    """A tensor (on the meta device: its shape) and the normal distribution it is drawn from."""

    tensor: Tensor
    mean: float
    deviation: float

    def pieces(self, seed: str) -> Iterator[Tensor]:
        """Its values in order, flat, float32, a piece at a time."""
        digest = hashlib.sha256(seed.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        for start in range(0, self.tensor.numel(), _PIECE):
            piece = torch.empty(min(_PIECE, self.tensor.numel() - start))
            yield piece.normal_(self.mean, self.deviation, generator=generator)


WriteWeights = Callable[[Path, Mapping[str, Draw], str, str], int]


def make_checkpoint(
    folder: Path,
    size: str = "tiny",
    components: Sequence[str] = WEIGHTED,
    sample_size: int | None = None,
    dtype: str = "float32",
    shard: str = "5GB",
    seed: int = 0,
    family: str = "pixart-sigma",
    write_weights: WriteWeights | None = None,
) -> None:
    """Write the components into `folder`; one made before with the same arguments is kept.

    Args:
        components: of "text_encoder" (with its tokenizer), "transformer" (with the scheduler) and
            "vae". A transformer alone gets no model_index.json, as the published 512 px one.
        sample_size: side of the transformer's latents, 1/8 of the picture's; None for the
            configuration's own.
        shard: size of the text encoder's largest file; the other two are one file each.
        write_weights: another way to write a file than to draw each value: path, tensors, dtype
            and seed to the file's bytes.

    Raises:
        RequestError: an argument that cannot be, or a folder that holds something else.
        StorageError: the folder cannot be written.
    """
    made_with = {"family": family, "size": size, "components": sorted(components), "seed": seed}
    made_with |= {"sample_size": sample_size, "dtype": dtype, "shard": shard}
    write = write_weights or _write_file
    made_with |= {} if write is _write_file else {"values": write.__name__}
    _check(made_with)
    if _is_made(folder, made_with):
        log.info("%s is already there", folder)
        return
    kind = all_families()[family]
    configs = _configs(kind, size, sample_size)
    with translated("make_checkpoint"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS).write_text("")
        for role in (role for role in WEIGHTED if role in components):
            model = build(kind.component(role), configs[role])
            place = folder / kind.component(role).subfolder
            _write_model(place, role, model, dtype, shard, seed, write)
        if "text_encoder" in components:
            tokenizer = kind.component("tokenizer")
            rows = int(configs["text_encoder"]["vocab_size"])
            write_tokenizer(folder / tokenizer.subfolder, tokenizer.class_name, rows)
        if set(components) != {"transformer"}:
            _write_index(folder, kind, configs["scheduler"], components)
        _write_json(folder / SETTINGS, made_with)


def build(component: Component, config: Config) -> Any:
    """The component from its real class, on the meta device: shapes without memory."""
    library, name = component.class_name.rsplit(".", 1)
    kind = getattr(importlib.import_module(library), name)
    with torch.device("meta"):
        if library == "transformers":
            return kind(kind.config_class(**config))
        return kind.from_config(dict(config))


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, or the exit code of the error that was printed."""
    parser = argparse.ArgumentParser(description="Write a checkpoint with random weights.")
    parser.add_argument("folder", type=Path, help="where; new, empty, or made by this before")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--components", default=",".join(WEIGHTED), help="default: %(default)s")
    parser.add_argument("--sample-size", type=int, help="side of the latents: 64 for 512 px")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--shard", default="5GB", help="largest text encoder file (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=list(all_families()), default="pixart-sigma")
    options = vars(parser.parse_args(arguments))
    options["components"] = options["components"].split(",")
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    try:
        make_checkpoint(**options)
    except LowvramError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


def _check(made_with: Mapping[str, Any]) -> None:
    allowed = {"family": all_families(), "size": SIZES, "dtype": DTYPES, "components": WEIGHTED}
    for name, values in allowed.items():
        given = made_with[name] if isinstance(made_with[name], list) else [made_with[name]]
        if not given or not set(given) <= set(values):
            raise RequestError(f"{name} {', '.join(given)!r}: use {', '.join(values)}")
    if not re.fullmatch(r"\d+(KB|MB|GB)", made_with["shard"]):
        raise RequestError(f"shard size {made_with['shard']!r}: write it as 5GB, 200MB or 64KB")
    if made_with["sample_size"] is not None and made_with["sample_size"] < 2:
        raise RequestError(f"sample size {made_with['sample_size']} is too small: 64 is for 512 px")


def _is_made(folder: Path, made_with: Mapping[str, Any]) -> bool:
    """Whether the folder already is what is asked for.

    Raises:
        RequestError: it holds something else, which is never overwritten.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if (folder / SETTINGS).is_file():
        text = (folder / SETTINGS).read_text(encoding="utf-8")
        if not text or json.loads(text) == made_with:
            return bool(text)
    raise RequestError(f"{folder} holds something else: delete it, or name another folder")


def _configs(family: Family, size: str, sample_size: int | None) -> dict[str, Config]:
    configs = dict(family.tiny_configs if size == "tiny" else family.published_configs)
    if sample_size is not None:
        # As the published models: 0.5, 1, 2 and 4 for 256, 512, 1024 and 2048 px.
        scale = {"sample_size": sample_size, "interpolation_scale": sample_size / 64}
        known = {name: value for name, value in scale.items() if name in configs["transformer"]}
        configs["transformer"] = {**configs["transformer"], **known}
    return configs


def _write_model(
    folder: Path,
    role: str,
    model: Any,
    dtype: str,
    shard: str,
    seed: int,
    write: WriteWeights,
) -> None:
    """Configuration and weights, laid out as `save_pretrained` would."""
    folder.mkdir(exist_ok=True)
    if role == "text_encoder":
        model.config.architectures, model.config.dtype = [type(model).__name__], dtype
        model.config.save_pretrained(folder)
        stem = "model"
    else:
        model.save_config(folder)
        stem, shard = "diffusion_pytorch_model", "1TB"
    draws = _draws(model)
    tensors = {name: draw.tensor.to(DTYPES[dtype]) for name, draw in draws.items()}
    log.info("%s: %s parameters in %s", role, f"{model.num_parameters():,}", dtype)
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=shard
    )
    for file, names in split.filename_to_tensors.items():
        started = time.monotonic()
        own = {name: draws[name] for name in names}
        size = write(folder / file, own, dtype, f"{seed} {role}")
        seconds = time.monotonic() - started
        log.info("%s/%s: %.1f MB in %.0f s", role, file, size / 1e6, seconds)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / f"{stem}.safetensors.index.json", index)


def _draws(model: Any) -> dict[str, Draw]:
    """How each tensor of the file is drawn, by name.

    Of tied weights the first name stands for all: T5's "shared.weight", as in the published file.
    """
    return {name: _draw(model, name, p.detach()) for name, p in model.named_parameters()}


def _draw(model: Any, name: str, tensor: Tensor) -> Draw:
    """Close to how the classes initialise themselves: a signal keeps its size through a matrix,
    so that activations stay finite in float16 and bfloat16.
    """
    if tensor.dim() == 1:  # a norm's weight, which multiplies, or a bias
        return Draw(tensor, mean=1.0 if name.endswith("weight") else 0.0, deviation=0.02)
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding):
        return Draw(tensor, mean=0.0, deviation=1.0)
    deviation = float(math.prod(tensor.shape[1:]) ** -0.5)
    if name.endswith("SelfAttention.q.weight"):  # T5 does not divide its attention scores
        deviation *= float(model.config.d_kv) ** -0.5
    return Draw(tensor, mean=0.0, deviation=deviation)


def _write_file(path: Path, draws: Mapping[str, Draw], dtype: str, seed: str) -> int:
    """Write a safetensors file piece by piece (its own writer needs all at once); its bytes."""
    kind = DTYPES[dtype]
    specs = [Spec(name, kind, tuple(draw.tensor.shape)) for name, draw in draws.items()]
    pieces = (
        piece.to(kind) for name, draw in draws.items() for piece in draw.pieces(f"{seed} {name}")
    )
    write_file(path, specs, pieces)
    return path.stat().st_size


def _write_index(
    folder: Path, family: Family, scheduler: Config, components: Sequence[str]
) -> None:
    """Write model_index.json, and the scheduler's configuration with the transformer."""
    version = {"_diffusers_version": diffusers.__version__}
    goes_with = {"tokenizer": "text_encoder", "scheduler": "transformer"}
    parts = [c for c in family.components if goes_with.get(c.role, c.role) in components]
    listed = {c.subfolder: c.class_name.rsplit(".", 1) for c in parts}
    _write_json(
        folder / "model_index.json",
        {"_class_name": family.pipelines[0], **version, **family.index, **listed},
    )
    if any(component.role == "scheduler" for component in parts):
        place = folder / family.component("scheduler").subfolder
        place.mkdir(exist_ok=True)
        _write_json(place / "scheduler_config.json", {**scheduler, **version})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
