"""What is still there after a release: tensors by name, or by what holds them."""

import gc
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MOST_LISTED = 100
# Finding a holder walks over every object there is, 10 ms to 50 ms each: only for the largest.
_MOST_EXPLAINED = 5
_MOST_LEVELS = 4

Before = Mapping[int, "weakref.ref[torch.Tensor]"]  # by id, which alone may be given anew
Watched = Mapping[str, "weakref.ref[torch.Tensor]"]


@dataclass(frozen=True)
class LeftTensor:
    """One tensor that outlived the release.

    Attributes:
        owner: its name in the component, else what holds it, else "not known".
        held_by: the types that hold it, innermost first; "" where none was found or looked for.
    """

    owner: str
    held_by: str
    shape: list[int]
    dtype: str
    bytes: int


def tensors_on(device: "torch.device") -> Before:
    """The tensors that lie on a device now. None on the CPU: it is full of other people's."""
    return {id(each): weakref.ref(each) for each in _found_on(device)}


def left_tensors(device: "torch.device", before: Before, watched: Watched) -> list[LeftTensor]:
    """What lies on the device and did not before, largest first, at most `MOST_LISTED`.

    On the CPU the component's own tensors only. What no Python object stands for (a library's
    workspace) is not seen; `StageReport.left_allocated_bytes` counts it.
    """
    names, found = {}, []
    for name, ref in watched.items():  # a comprehension would leave a cell that holds a tensor
        tensor = ref()
        if tensor is not None:
            names[id(tensor)] = name
            found.append(tensor)
    found += [each for each in _found_on(device) if id(each) not in names]
    old = {key for key, ref in before.items() if ref() is not None}
    found = [each for each in found if id(each) not in old]
    found.sort(key=_bytes, reverse=True)
    left = []
    for index, tensor in enumerate(found[:MOST_LISTED]):
        holder = _holder(tensor, found) if index < _MOST_EXPLAINED else ""
        left.append(
            LeftTensor(
                owner=names.get(id(tensor)) or holder or "not known",
                held_by=holder,
                shape=list(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                bytes=_bytes(tensor),
            )
        )
    return left


def _found_on(device: "torch.device") -> "list[torch.Tensor]":
    import torch

    if device.type == "cpu":
        return []
    # By type, not isinstance: that asks every object for its class, and lazy modules then import.
    return [
        each
        for each in gc.get_objects()
        if issubclass(type(each), torch.Tensor) and each.device.type == device.type
    ]


def _bytes(tensor: "torch.Tensor") -> int:
    return tensor.numel() * tensor.element_size()


def _holder(tensor: object, ours: list["torch.Tensor"]) -> str:
    """The types of what refers to an object, up to the first that is no plain container."""
    names: list[str] = []
    ignored = {id(ours)}
    held: object = tensor
    for _ in range(_MOST_LEVELS):
        referrers = gc.get_referrers(held)
        ignored.add(id(referrers))
        others = (each for each in referrers if id(each) not in ignored)
        holder = next((each for each in others if not isinstance(each, FrameType)), None)
        if holder is None:
            break
        names.append(_name(holder))
        if type(holder) not in (dict, list, tuple, set):
            break
        held = holder
    told = [name for name in names if name != "dict"]  # those of objects say nothing
    return " in ".join(told or names)


def _name(holder: object) -> str:
    """Its type; a module's variables by the module's name."""
    if isinstance(holder, dict):
        module = sys.modules.get(str(holder.get("__name__")))
        if module is not None and vars(module) is holder:
            return f"module {module.__name__}"
    return type(holder).__qualname__
