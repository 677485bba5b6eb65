"""Weights that stream: a few units on the device, the next ones on their way.

The network's repeated blocks (or each matrix in them) come from the safetensors files when they are
needed and go when they were used; everything else stays. Embedding tables are read by single rows.
No copy of the whole model is made, in memory or on disk, and what is computed is bit for bit what
the resident model computes.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowvram.errors import ModelError
from lowvram.weights.checkpoint import (
    OnCount,
    broken_files_named,
    check_complete,
    check_stored_quantisation,
    skeleton,
    stored_dtype,
)
from lowvram.weights.lanes import Unit, choose_lane
from lowvram.weights.layout import Blocks, Layout, find_blocks, streaming_modules, unit_bytes
from lowvram.weights.lockstep import Lockstep
from lowvram.weights.parking import HOST, park
from lowvram.weights.pump import Pump, Relay, Supply
from lowvram.weights.rows import EmbeddingRows
from lowvram.weights.shards import Shards

T = TypeVar("T")


@dataclass(frozen=True)
class Streamed:
    """Blocks, or their matrices, on the device only while they are used.

    Attributes:
        dtype: to compute in; converted to on the way where the files hold another.
        blocks: path of the repeated blocks in the network; or where they differ the paths of all,
            in order of use.
        order: see `families.family.Component`: of matrices that are used in another order than they
            are listed.
        unit: what comes and goes: "block", or "matrix" (of each nn.Linear and nn.Conv2d; the rest
            of a block stays).
        window: units that have room on the device, 2 or more: one in use, the others under way.
        resident: blocks, evenly spaced, that stay on the device; with "block" only.
        together: calls that may be under way at once; more are taken in several passes. 0 for all.
        group: of those, calls that may be inside a block at once where units are matrices.
        repeats: whether passes follow one another (each denoising step is one), so that the reader
            runs on into the next.
        parks: whether tensors between blocks lie on the host: room for many calls at once.
        keep: hold the units in pinned memory after the first pass. No effect on a CPU.
    """

    dtype: torch.dtype
    blocks: Blocks
    order: tuple[str, ...] = ()
    unit: str = "block"
    window: int = 2
    resident: int = 0
    together: int = 0
    group: int = 1
    repeats: bool = False
    parks: bool = False
    keep: bool = False

    @property
    def name(self) -> str:
        """As on the command line."""
        return "stream"

    def __str__(self) -> str:
        stays = f", {self.resident} blocks stay" if self.resident else ""
        kept = ", kept in pinned memory" if self.keep else ""
        return f"{self.unit} by {self.unit}{stays}{kept}"

    def sizes(self, network: nn.Module) -> list[int]:
        """See `Weights.sizes`: what stays, and the window."""
        return Layout(network, self.blocks).sizes(self)

    def moving(self, network: nn.Module) -> int:
        """Bytes that come and go in a pass, of a network that may have no storage."""
        blocks = find_blocks(network, self.blocks)
        modules = streaming_modules(blocks, self.unit, self.resident)
        return sum(unit_bytes(module) for _, module in modules)

    def load(self, model_class: Any, folder: Path, device: torch.device) -> "Streaming":
        """See `Weights.load`."""
        check_stored_quantisation(folder, "")
        with broken_files_named(folder):
            model = skeleton(model_class, folder, self.dtype)
            return Streaming(self, model, Shards(folder), device)


class Streaming:
    """A network whose weights stream. See `checkpoint.Loaded`."""

    def __init__(
        self, how: Streamed, model: nn.Module, shards: Shards, device: torch.device
    ) -> None:
        self.model, self.inputs = model, HOST if how.parks else device
        self._how, self._shards, self._device = how, shards, device
        self._pump: Supply | None = None
        self._groups = 1  # how often the pump brings each block in a pass
        self._read_rows()
        blocks = find_blocks(model, how.blocks)
        modules = streaming_modules(blocks, how.unit, how.resident, how.order)
        self._owners: list[dict[str, tuple[nn.Module, str]]] = []
        # Made once: small objects made anew between large ones keep glibc from using the large
        # ones' memory again (2.3 GB lost in one step of XL/2).
        self._placeholders: dict[str, nn.Parameter] = {}
        self._units = [self._unit(module) for _, module in modules]
        self._load_residents({name for unit in self._units for name in unit.names})
        slots = min(how.window, len(self._units))
        self._lane = choose_lane(shards, self._units, slots, device, how.keep)
        self._blocks = [block for block, _ in modules]
        self._lockstep = Lockstep(blocks, modules)
        self._count = len(blocks)
        for index, (_, module) in enumerate(modules):
            module.register_forward_pre_hook(self._before(index))
            module.register_forward_hook(self._after(index))
        if how.parks and device.type != "cpu":
            park(model, blocks, device)

    @property
    def weights_bytes(self) -> int:
        """See `Loaded`: what stays and the window."""
        stays = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in itertools.chain(self.model.parameters(), self.model.buffers())
            if tensor.device.type == self._device.type
        }
        return sum(stays.values()) + self._lane.held_bytes

    def each(self, calls: Sequence[Callable[[], T]], on_count: OnCount) -> list[T]:
        """See `Loaded`: side by side, in as few passes over the weights as go. Counts blocks."""
        last = self._count
        together = self._how.together or len(calls)
        passes = -(-len(calls) // together)
        results: list[T] = []
        for number in range(passes):
            part = calls[number * together : (number + 1) * together]
            group = self._how.group if self._how.unit == "matrix" else len(part)
            groups = -(-len(part) // group)
            if self._must_start(groups):
                self._start(groups)

            def on_block(block: int, done: int = number * last + 1) -> None:
                on_count(done + block, passes * last)

            results += self._lockstep.run(part, group, self._supplied, on_block)
        return results

    def close(self) -> None:
        """See `Loaded`."""
        if self._pump is not None:
            self._pump.close()
            self._pump = None
        self._lane.close()
        self._shards.close()

    def _must_start(self, groups: int) -> bool:
        """Whether at the start of a pass what brings the units is not there, or not the right one:
        no reader is needed any more when all is kept.
        """
        if self._pump is None or not self._how.repeats or self._groups != groups:
            return True
        return self._lane.holds_all and not isinstance(self._pump, Relay)

    def _start(self, groups: int) -> None:
        """What brings, pass by pass, the units of each block once for every group."""
        if self._pump is not None:
            self._pump.close()
        order: list[int] = []
        for _, same in itertools.groupby(range(len(self._units)), lambda unit: self._blocks[unit]):
            order += list(same) * groups
        self._groups = groups
        again = itertools.cycle(order) if self._how.repeats else order
        brings = Relay if self._lane.holds_all else Pump
        self._pump = brings(self._lane, self._units, again)

    @contextmanager
    def _supplied(self, index: int) -> Iterator[None]:
        self._take(index)
        yield
        self._give_back(index)

    def _take(self, index: int) -> None:
        assert self._pump is not None
        try:
            tensors = self._pump.take(index)
        except OSError as error:
            name = error.filename or self._shards.folder
            raise ModelError(
                f"{name} cannot be read ({error.strerror}): check the disk, or download it again"
            ) from None
        for name, (owner, leaf) in self._owners[index].items():
            owner._parameters[leaf] = nn.Parameter(tensors[name], requires_grad=False)

    def _give_back(self, index: int) -> None:
        for name, (owner, leaf) in self._owners[index].items():
            owner._parameters[leaf] = self._placeholders[name]
        if self._pump is not None:
            self._pump.give_back(index)

    def _before(self, index: int) -> Callable[..., None]:
        def take(module: nn.Module, inputs: Any) -> None:
            if self._lockstep.is_running:
                return
            if self._pump is None or (index == 0 and self._must_start(1)):
                self._start(1)
            self._take(index)

        return take

    def _after(self, index: int) -> Callable[..., None]:
        def give_back(module: nn.Module, inputs: Any, output: Any) -> None:
            if not self._lockstep.is_running:
                self._give_back(index)

        return give_back

    def _unit(self, module: nn.Module) -> Unit:
        """The parameters of a module as a unit; remembers where each belongs."""
        prefix = next(name for name, each in self.model.named_modules() if each is module)
        names, owners = {}, {}
        for name, parameter in module.named_parameters():
            full = f"{prefix}.{name}"
            self._check(full, parameter)
            names[full] = stored_dtype(type(self.model), full, self._how.dtype)
            path, _, leaf = name.rpartition(".")
            owners[full] = (module.get_submodule(path), leaf)
            self._placeholders[full] = self._shards.placeholder(full, names[full])
            owners[full][0]._parameters[leaf] = self._placeholders[full]
        self._owners.append(owners)
        return Unit.of(names, self._shards)

    def _load_residents(self, streamed: set[str]) -> None:
        """Everything that does not stream, onto the device."""
        for path, owner in self.model.named_modules():
            for leaf, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
                name = f"{path}.{leaf}".lstrip(".")
                if tensor is None or name in streamed:
                    continue
                if leaf in owner._parameters:
                    self._check(name, tensor)
                    dtype = stored_dtype(type(self.model), name, self._how.dtype)
                    value = self._resident(name, dtype)
                    owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
                elif name in self._shards.tensors:
                    value = self._shards.read(name, tensor.dtype)
                    owner._buffers[leaf] = value.to(self._device)
                else:
                    owner._buffers[leaf] = tensor.to(self._device)

    def _resident(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight that stays. On the CPU the mapped file where it will do, as safetensors has it:
        MKL's last bits depend on how matrices are aligned.
        """
        if self._device.type == "cpu" and self._shards.tensors[name].dtype == dtype:
            return self._shards.view(name)
        return self._shards.read(name, dtype).to(self._device)

    def _read_rows(self) -> None:
        """Replace embedding tables by readers of single rows."""
        ties = getattr(type(self.model), "_tied_weights_keys", None)
        ties = ties if isinstance(ties, dict) else {}
        blocks = find_blocks(self.model, self._how.blocks)
        inside = {id(module) for block in blocks for module in block.modules()}
        for path, module in list(self.model.named_modules()):
            if type(module) is not nn.Embedding or id(module) in inside:
                continue
            own = f"{path}.weight"
            name = own if own in self._shards.tensors else ties.get(own, own)
            self._check(name, module.weight)
            dtype = stored_dtype(type(self.model), own, self._how.dtype)
            parent, _, leaf = path.rpartition(".")
            rows = EmbeddingRows(self._shards, name, dtype)
            setattr(self.model.get_submodule(parent), leaf, rows)

    def _check(self, name: str, tensor: Tensor) -> None:
        stored = self._shards.tensors.get(name)
        if stored is None:
            known = self._shards.tensors
            missing = [each for each, _ in self.model.named_parameters() if each not in known]
            missing = [name, *(each for each in missing if each != name)]
            check_complete(self.model, missing, self._shards.folder)
        elif stored.shape != tuple(tensor.shape):
            raise ModelError(
                f"{name} has shape {list(stored.shape)} and should have {list(tensor.shape)}"
            )
