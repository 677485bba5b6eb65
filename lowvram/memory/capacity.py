"""How much memory a device has, and has free, by every counter that there is.

They differ: torch asks the driver for what this process could get, NVML counts for the whole card,
and on Windows the first counts memory of the system too. What a machine does not tell is None.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowvram.errors import first_line
from lowvram.memory.counters import nvml_handle

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Counter:
    """One counter's answer.

    Attributes:
        name: what was asked.
        free, total: bytes; None where it does not say.
        why: it does not say.
    """

    name: str
    free: int | None
    total: int | None
    why: str = ""


def count_device(device: "torch.device") -> list[Counter]:
    """The same three counters on every machine, known or not: mem_get_info, NVML (on ROCm what
    stands in its place, amdsmi) and torch.accelerator.
    """
    asked: dict[str, Callable[[torch.device], tuple[int | None, int | None]]] = {
        "mem_get_info": _mem_get_info,
        "nvml": _management,
        "torch.accelerator": _accelerator,
    }
    return [_count(name, ask, device) for name, ask in asked.items()]


def free_bytes(device: "torch.device") -> int | None:
    """What may be counted on: the least of the counters. None for a CPU, or where none says."""
    known = [counter.free for counter in count_device(device) if counter.free is not None]
    return min(known, default=None)


def nvml_names() -> list[str]:
    """The NVIDIA cards of this machine, whether torch sees them or not."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    except Exception:  # no driver library
        return []


def _count(name: str, ask: Callable[..., Any], device: "torch.device") -> Counter:
    if device.type == "cpu":
        return Counter(name, None, None, "no accelerator")
    try:
        free, total = ask(device)
    except Exception as error:
        return Counter(name, None, None, first_line(error))
    return Counter(name, free, total)


def _mem_get_info(device: "torch.device") -> tuple[int | None, int | None]:
    import torch

    if device.type == "mps":  # memory of the system: what is free of it, Metal does not say
        return None, torch.mps.recommended_max_memory()
    module = torch.xpu if device.type == "xpu" else torch.cuda
    return module.mem_get_info(device)


def _management(device: "torch.device") -> tuple[int | None, int | None]:
    """NVML's view of the whole card."""
    import torch

    if device.type != "cuda":
        raise RuntimeError("not an NVIDIA card")
    if torch.version.hip:
        total = torch.cuda.get_device_properties(device).total_memory
        return total - torch.cuda.device_memory_used(device), total
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(nvml_handle(device))
    return int(memory.free), int(memory.total)


def _accelerator(device: "torch.device") -> tuple[int | None, int | None]:
    import torch

    return torch.accelerator.get_memory_info(device)
