"""A checkpoint in one dtype or quantised, made and written tensor by tensor, in streaming order.

Resident tensors come first, then block after block, each in the order in which the module
registers them. What is written is what `from_pretrained` with the same strategy and
`save_pretrained` after it would write, tensor for tensor. Knows no family.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowvram.errors import ModelError
from lowvram.weights.checkpoint import (
    Weights,
    broken_files_named,
    check_complete,
    check_stored_quantisation,
    stored_dtype,
)
from lowvram.weights.layout import Blocks
from lowvram.weights.quantized import Quantized
from lowvram.weights.shards import Shards
from lowvram.weights.tensor_files import (
    Spec,
    in_file_order,
    is_odd,
    verify_file,
    write_file,
)

if TYPE_CHECKING:
    from transformers.quantizers import HfQuantizer

SHARD_BYTES = 1_000_000_000  # a file's most, unless a single block is larger

OnBytes = Callable[[int], None]  # called with the bytes that are done


@dataclass(frozen=True)
class _Entry:
    """A tensor of the source and what is made of it."""

    name: str  # in the module
    stored: str  # in the source's files: another name where weights are tied
    specs: tuple[Spec, ...]


class Conversion:
    """What will be written: planned from the configuration and the headers of the source's files.

    Attributes:
        total_bytes: of all tensors.
        shards: the tensors of each file.

    Raises:
        ModelError: the source is quantised already, or lacks weights.
    """

    def __init__(self, model_class: Any, folder: Path, weights: Weights, blocks: Blocks) -> None:
        """`blocks`: of the module, as `Streamed` has them; "" where there are none."""
        check_stored_quantisation(folder, "")
        self._weights = weights
        self._folder = folder
        self._class = model_class
        with broken_files_named(folder):
            self._skeleton = _skeleton(model_class, folder)
            self._source = Shards(folder)
        self._quantiser = (
            _Quantiser(weights, self._skeleton) if isinstance(weights, Quantized) else None
        )
        units = _units(self._entries(), blocks)
        self.total_bytes = sum(_bytes(unit) for unit in units)
        self.shards = _shards(units)

    def write(self, folder: Path, on_bytes: OnBytes) -> None:
        """Write configuration, tensors and their index into an existing folder.

        Raises:
            OSError: it cannot be written. ModelError: a file of the source is damaged.
        """
        self._write_config(folder)
        done = 0
        for path, shard in self._paths(folder):
            write_file(path, _specs(shard), self._pieces(shard, done, on_bytes))
            done += _bytes(shard)
        if len(self.shards) > 1:
            weight_map = {
                spec.name: path.name
                for path, shard in self._paths(folder)
                for spec in _specs(shard)
            }
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / f"{self._stem}.safetensors.index.json").write_text(text, encoding="utf-8")

    def verify(self, folder: Path, on_bytes: OnBytes) -> dict[str, str]:
        """Convert everything a second time and compare it with what lies on the disk.

        Returns:
            the sha256 of each file of tensors, by its name.

        Raises:
            DamagedFileError: names the first tensor that differs.
        """
        digests, done = {}, 0
        for path, shard in self._paths(folder):
            pieces = self._pieces(shard, done, on_bytes)
            digests[path.name] = verify_file(path, _specs(shard), pieces)
            done += _bytes(shard)
        return digests

    @cached_property
    def _stem(self) -> str:
        """How the library names files of weights."""
        return "model" if _is_transformers(self._class) else "diffusion_pytorch_model"

    def _entries(self) -> Iterator[_Entry]:
        """In the order of registration, tied weights once, under their first name."""
        names: dict[int, list[str]] = {}
        state = self._skeleton.state_dict(keep_vars=True)
        for name, tensor in state.items():
            names.setdefault(id(tensor), []).append(name)
        there = self._source.tensors
        missing = [tied[0] for tied in names.values() if not there.keys() & set(tied)]
        check_complete(self._skeleton, missing, self._folder)
        for tied in names.values():
            stored = [name for name in tied if name in there]
            for other in stored[1:]:
                if not torch.equal(self._read(stored[0]), self._read(other)):
                    raise ModelError(
                        f"{self._folder} has {stored[0]} and {other}, which should be one tensor, "
                        "with different values: use the original files"
                    )
            yield _Entry(tied[0], stored[0], self._planned(tied[0], stored[0], state[tied[0]]))

    def _planned(self, name: str, stored: str, empty: Tensor) -> tuple[Spec, ...]:
        shape = self._source.tensors[stored].shape
        if shape != tuple(empty.shape):
            raise ModelError(
                f"{self._folder} holds {stored} of shape {list(shape)}, but its config.json "
                f"says {list(empty.shape)}: download or prepare it again"
            )
        if self._quantiser is not None and self._quantiser.takes(name):
            return self._quantiser.planned(name, shape)
        return (Spec(name, self._dtype(name, stored), shape),)

    def _dtype(self, name: str, stored: str) -> torch.dtype:
        own = self._source.tensors[stored].dtype
        if not own.is_floating_point:
            return own
        return stored_dtype(self._class, name, self._weights.dtype)

    def _pieces(self, shard: Sequence[_Entry], done: int, on_bytes: OnBytes) -> Iterator[Tensor]:
        """The values of a file in its order; a handful of tensors in memory at a time."""
        odd: dict[str, Tensor] = {}
        for entry in shard:
            made = self._convert(entry)
            for spec in entry.specs:
                if is_odd(spec):
                    odd[spec.name] = made.pop(spec.name).clone()
                else:
                    yield made.pop(spec.name)
            done += sum(spec.bytes for spec in entry.specs)
            on_bytes(done)
        yield from (odd[spec.name] for spec in _specs(shard) if is_odd(spec))

    def _convert(self, entry: _Entry) -> dict[str, Tensor]:
        if self._quantiser is not None and self._quantiser.takes(entry.name):
            # from_pretrained, too, converts before it quantises
            matrix = self._read(entry.stored, self._weights.dtype)
            return self._quantiser.quantise(entry.name, matrix)
        return {entry.name: self._read(entry.stored, self._dtype(entry.name, entry.stored))}

    def _read(self, stored: str, dtype: torch.dtype | None = None) -> Tensor:
        with broken_files_named(self._folder):
            return self._source.read(stored, dtype or self._source.tensors[stored].dtype)

    def _paths(self, folder: Path) -> Iterator[tuple[Path, list[_Entry]]]:
        count = len(self.shards)
        for number, shard in enumerate(self.shards, start=1):
            part = f"-{number:05d}-of-{count:05d}" if count > 1 else ""
            yield folder / f"{self._stem}{part}.safetensors", shard

    def _write_config(self, folder: Path) -> None:
        if not _is_transformers(self._class):
            self._skeleton.save_config(folder)
            return
        config = self._skeleton.config
        config.architectures, config.dtype = [self._class.__name__], self._weights.dtype
        if self._quantiser is not None:
            config.quantization_config = self._quantiser.config
        config.save_pretrained(folder)


class _Quantiser:
    """What transformers and bitsandbytes do with a matrix while loading, for one at a time.

    No forward pass is ever made here: after one on a CPU, nf4 is saved in another layout.
    """

    def __init__(self, weights: Quantized, skeleton: nn.Module) -> None:
        from transformers.quantizers import AutoHfQuantizer

        self._skeleton = skeleton
        self._quantizer: HfQuantizer = AutoHfQuantizer.from_config(
            weights.config(), pre_quantized=False
        )
        # Replaces the linear layers that it takes, all in the skeleton.
        self._quantizer.preprocess_model(model=skeleton, dtype=weights.dtype, device_map=None)
        self._dtype = weights.dtype
        self._specs: dict[tuple[int, ...], list[Spec]] = {}  # by shape, named within the layer

    @property
    def config(self) -> Any:
        """For config.json."""
        return self._quantizer.quantization_config

    def takes(self, name: str) -> bool:
        """Whether this tensor is quantised."""
        return bool(self._quantizer.param_needs_quantization(self._skeleton, name))

    def planned(self, name: str, shape: tuple[int, ...]) -> tuple[Spec, ...]:
        """The tensors that a matrix becomes; known by doing it once for each shape."""
        layer = name.rpartition(".")[0]
        if shape not in self._specs:
            made = self.quantise(name, torch.ones(shape, dtype=self._dtype))
            self._specs[shape] = [
                Spec(each.removeprefix(layer), value.dtype, tuple(value.shape))
                for each, value in made.items()
            ]
        return tuple(Spec(layer + s.name, s.dtype, s.shape) for s in self._specs[shape])

    def quantise(self, name: str, matrix: Tensor) -> dict[str, Tensor]:
        """What the layer would save, its bias excepted."""
        path = name.rpartition(".")[0]
        layer = self._skeleton.get_submodule(path)
        empty = layer.weight
        operation = self._quantizer.get_quantize_ops()
        made = operation.convert({name: matrix}, model=self._skeleton, full_layer_name=name)
        try:
            layer.weight = made[name]
            state = layer.state_dict(prefix=f"{path}.")
        finally:
            layer.weight = empty
        return {
            each: value.detach().as_subclass(Tensor)
            for each, value in state.items()
            if each != f"{path}.bias"
        }


def _is_transformers(model_class: Any) -> bool:
    return str(model_class.__module__).startswith("transformers.")


def _skeleton(model_class: Any, folder: Path) -> Any:
    """The module on the meta device: shapes without memory, tied weights still one parameter."""
    with torch.device("meta"):
        if _is_transformers(model_class):
            return model_class(model_class.config_class.from_pretrained(folder))
        return model_class.from_config(model_class.load_config(folder))


def _units(entries: Iterator[_Entry], blocks: Blocks) -> list[list[_Entry]]:
    """What is never split between files: the resident tensors, then each block's."""
    units: dict[tuple[int, int], list[_Entry]] = {(-1, 0): []}
    paths = (blocks,) if isinstance(blocks, str) else blocks
    known = [re.compile(rf"{re.escape(path)}\.(\d*)" if path else "(?!)") for path in paths]
    for entry in entries:
        at = [(i, match[1]) for i, each in enumerate(known) if (match := each.match(entry.name))]
        place = (at[0][0], int(at[0][1] or 0)) if at else (-1, 0)  # its path, its place in a list
        units.setdefault(place, []).append(entry)
    return [units[place] for place in sorted(units)]


def _shards(units: list[list[_Entry]]) -> list[list[_Entry]]:
    shards: list[list[_Entry]] = [[]]
    for unit in units:
        if shards[-1] and _bytes(shards[-1]) + _bytes(unit) > SHARD_BYTES:
            shards.append([])
        shards[-1] += unit
    return shards


def _specs(entries: Sequence[_Entry]) -> list[Spec]:
    return in_file_order([spec for entry in entries for spec in entry.specs])


def _bytes(entries: Sequence[_Entry]) -> int:
    return sum(spec.bytes for entry in entries for spec in entry.specs)
