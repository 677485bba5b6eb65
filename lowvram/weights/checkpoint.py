"""What every strategy shares: the concrete class of a component, its bytes, errors in its files."""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lowvram.errors import ModelError, first_line, is_out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import nn


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

    def load(self, model_class: Any, folder: Path, device: "torch.device") -> "nn.Module":
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
            f"{folder} cannot be loaded ({first_line(error)[:200]}): download or make it again"
        ) from None


def check_complete(model: "nn.Module", missing: list[str], folder: Path) -> None:
    """Refuse a checkpoint without some of the component's weights: they would be random.

    Raises:
        ModelError: names the first that is missing.
    """
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} weights of {type(model).__name__} "
            f"({missing[0]}, …): download or make it again"
        )


def counted_bytes(model: "nn.Module") -> int:
    """Bytes of all weights and buffers, each storage once; quantisation scales included."""
    sizes = {}
    for tensor in _tensors(model):
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
