"""The one place where a component is built, lent and released.

`use` lends the loaded module to a function and takes it back when that returns: a variable bound
by `with … as model` would outlive its block and keep the weights alive. What stays behind
after the release is named. While it is lent float32 means float32: on a GPU nothing is rounded to
TF32.
"""

import gc
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lowvram.memory.budget import capped, tracked
from lowvram.memory.leftovers import LeftTensor, left_tensors, tensors_on
from lowvram.memory.meter import Meter
from lowvram.memory.plan import Room
from lowvram.weights.checkpoint import Loaded, Weights, find_class, named_tensors

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Used(Generic[T]):
    """What came of lending a component.

    Attributes:
        result: of the work.
        weights_bytes: what the weights held on the device at most.
        left_behind: names of its tensors that are still alive after the release.
        left_tensors: these, and on an accelerator every other that was not there before.
    """

    result: T
    weights_bytes: int
    left_behind: list[str]
    left_tensors: list[LeftTensor]


def use(
    class_name: str,
    folder: Path,
    weights: Weights,
    device: "torch.device",
    meter: Meter,
    room: Room,
    work: Callable[[Loaded], T],
) -> Used[T]:
    """Load a component, do `work` with it, release it.

    Args:
        class_name: "library.ClassName".
        folder: holds its configuration and safetensors.
        meter: gets the phases "load", "compute" and "release".
        room: what may be allocated; where the user has set it, going over is an error.

    Raises:
        ModelError: its files are missing or damaged. Whatever `work` raises.
    """
    import torch

    loaded = None
    before = tensors_on(device)
    gc.freeze()  # what is there already need not be searched at the release: half a second
    try:
        with torch.inference_mode(), exact_float32(), capped(device, room):
            model_class = find_class(class_name)  # imports for seconds: not part of loading
            with meter.phase("load"):
                loaded = weights.load(model_class, folder, device)
            size = loaded.weights_bytes
            watched = {
                name: weakref.ref(tensor) for name, tensor in named_tensors(loaded.model).items()
            }
            with meter.phase("compute"), tracked(device, room, size) as meter.tracker:
                result = work(loaded)
        with meter.phase("release"):
            loaded.close()
            loaded = None
            flush(device)
    except BaseException as error:
        # Whoever keeps the error (a notebook does) must not keep the weights through its frames.
        traceback.clear_frames(error.__traceback__)
        if loaded is not None:
            loaded.close()
        loaded = None  # drops the last reference
        flush(device)
        raise
    finally:
        gc.unfreeze()
    left = [name for name, tensor in watched.items() if tensor() is not None]
    return Used(result, size, left, left_tensors(device, before, watched))


@contextmanager
def exact_float32() -> Iterator[None]:
    """A context without TF32, in which cuDNN computes float32 convolutions unless told not to:
    with 10 bits of 23, 2e-3 of the largest value off in a VAE's picture (H100).
    """
    import torch

    # Not `allow_tf32`: torch refuses to read it in a process that has used these.
    backends: Any = torch.backends
    places = backends.cuda.matmul, backends.cudnn.conv
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def flush(device: "torch.device") -> None:
    """Collect what is unreachable and give the allocator's cache back to the driver."""
    import torch

    gc.collect()
    if device.type == "cuda":
        # cuBLAS keeps its workspace from the first matrix product on, 32 MiB on Hopper: it would
        # count as left behind, and lie beside the next component.
        with suppress(AttributeError):  # no public name
            torch._C._cuda_clearCublasWorkspaces()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
