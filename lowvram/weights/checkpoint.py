"""What every strategy shares: the concrete class of a component, its bytes, errors in its files."""

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lowvram.errors import ModelError, first_line, is_out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import nn


T = TypeVar("T")
OnCount = Callable[[int, int], None]  # done, total


class Loaded(Protocol):
    """A component on loan: the network, and what has to be known to use it and to end it."""

    @property
    def model(self) -> "nn.Module":
        """The network, in evaluation mode."""
        ...

    @property
    def inputs(self) -> "torch.device":
        """Where the tensors that go in shall lie."""
        ...

    @property
    def weights_bytes(self) -> int:
        """What its weights hold on the device at most, quantisation scales included."""
        ...

    def each(self, calls: Sequence[Callable[[], T]], on_count: OnCount) -> list[T]:
        """Carry out calls of the network, in any order; their results in the order given.

        Args:
            on_count: told how far it is, in calls or in blocks of the network.
        """
        ...

    def close(self) -> None:
        """End what runs beside: threads, buffers, mapped files. Called whatever happens."""
        ...


@dataclass
class Resident:
    """A component whose weights all lie on the device."""

    model: "nn.Module"
    inputs: "torch.device"

    @property
    def weights_bytes(self) -> int:
        """See `Loaded`."""
        return counted_bytes(self.model)

    def each(self, calls: Sequence[Callable[[], T]], on_count: OnCount) -> list[T]:
        """See `Loaded`: one after another."""
        results = []
        for call in calls:
            results.append(call())
            on_count(len(results), len(calls))
        return results

    def close(self) -> None:
        """See `Loaded`: nothing runs beside."""


class Weights(Protocol):
    """A strategy: a small frozen value that can load a component."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    @property
    def dtype(self) -> "torch.dtype":
        """Of all that is not quantised."""
        ...

    def sizes(self, network: "nn.Module") -> list[int]:
        """Bytes of each tensor or buffer that its weights hold on the device at most.

        Args:
            network: as `build` makes it; may have no storage, is not changed.
        """
        ...

    def load(self, model_class: Any, folder: Path, device: "torch.device") -> Loaded:
        """The component, ready to compute on the device, in evaluation mode.

        Raises:
            ModelError: files are missing, damaged or not of this class.
        """
        ...


def find_class(class_name: str) -> Any:
    """The class behind "library.ClassName"; only that class's own modules are imported."""
    library, _, name = class_name.partition(".")
    return getattr(importlib.import_module(library), name)


@contextmanager
def broken_files_named(folder: Path) -> Iterator[None]:
    """Turn what the libraries say of missing or damaged files into one line.

    Raises:
        ModelError: names the folder.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, ModelError):
            raise
        raise ModelError(
            f"{folder} cannot be loaded ({first_line(error)[:200]}): download or prepare it again"
        ) from None


def check_complete(model: "nn.Module", missing: list[str], folder: Path) -> None:
    """Refuse a checkpoint without some of the component's weights: they would be random.

    Raises:
        ModelError: names the first that is missing.
    """
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} weights of {type(model).__name__} "
            f"({missing[0]}, …): download or prepare it again"
        )


def stored_dtype(model_class: Any, name: str, dtype: "torch.dtype") -> "torch.dtype":
    """The dtype in which `from_pretrained(dtype=dtype)` holds a weight.

    Some classes keep parts in float32: transformers in float16 only (`_keep_in_fp32_modules`) or in
    both halves (`…_strict`), diffusers in both halves. Source: `modeling_utils.py` of the two.
    """
    import torch

    def named(attribute: str) -> set[str]:
        return set(getattr(model_class, attribute, None) or ())

    keep: set[str] = set()
    if dtype != torch.float32:
        keep = named("_keep_in_fp32_modules_strict")
        if dtype == torch.float16 or model_class.__module__.startswith("diffusers."):
            keep |= named("_keep_in_fp32_modules")
    return torch.float32 if keep & set(name.split(".")) else dtype


def build(model_class: Any, config: Mapping[str, Any], dtype: "torch.dtype") -> "nn.Module":
    """The network of a configuration, every tensor as `from_pretrained(dtype=dtype)` types it.

    Both libraries make it under that default dtype and convert parameters only: buffers with a
    dtype of their own keep it.
    """
    import torch
    from diffusers.configuration_utils import ConfigMixin

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if issubclass(model_class, ConfigMixin):
            model = model_class.from_config(dict(config))
        else:
            model = model_class(model_class.config_class.from_dict(dict(config)))
    finally:
        torch.set_default_dtype(before)
    for path, owner in model.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            wanted = stored_dtype(model_class, f"{path}.{leaf}".lstrip("."), dtype)
            if parameter.is_meta and parameter.dtype != wanted:
                empty = torch.empty(parameter.shape, dtype=wanted, device=parameter.device)
                owner._parameters[leaf] = torch.nn.Parameter(empty)
    model.eval().requires_grad_(False)
    return model


def skeleton(model_class: Any, folder: Path, dtype: "torch.dtype") -> "nn.Module":
    """The network with parameters that have shapes only (device "meta") and real buffers."""
    from accelerate import init_empty_weights

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with init_empty_weights(include_buffers=False):
        return build(model_class, config, dtype)


def counted_bytes(model: "nn.Module") -> int:
    """Bytes of all weights and buffers, each storage once; quantisation scales included.

    Placeholders on the device "meta" count nothing.
    """
    sizes = {}
    for tensor in _tensors(model):
        if tensor.device.type == "meta":
            continue
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr() or id(storage)] = storage.nbytes()
    return sum(sizes.values())


def named_tensors(model: "nn.Module") -> "dict[str, torch.Tensor]":
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _tensors(model: "nn.Module") -> "Iterator[torch.Tensor]":
    for tensor in named_tensors(model).values():
        yield tensor
        # bitsandbytes keeps its scales beside the parameter: SCB (8-bit), a QuantState (4-bit)
        state = getattr(tensor, "quant_state", None)
        for extra in (getattr(tensor, "SCB", None), getattr(state, "absmax", None)):
            if extra is not None:
                yield extra


def check_stored_quantisation(folder: Path, wanted: str) -> bool:
    """Refuse a folder whose own quantisation would silently win over what was asked for.

    Args:
        wanted: the flag in its `quantization_config` that must be set; "" for no quantisation.

    Returns:
        whether it is quantised, as wanted.

    Raises:
        ModelError: it is quantised, and not so.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} has no readable config.json ({first_line(error)})") from None
    stored = config.get("quantization_config")
    if stored and not stored.get(wanted):
        raise ModelError(
            f"{folder} is quantised already, in another way: "
            "use the --weights it was made for, or the original files"
        )
    return bool(stored)
