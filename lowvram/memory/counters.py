"""The memory counters of devices, read without ever creating a device's context.

Asking a driver through torch creates a context of hundreds of MB, so what belongs to a device is
asked only once the work itself has created it. What a machine does not tell is None.
"""

import os
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

Known = int | None  # bytes; None where it is not told


class DeviceCounters(Protocol):
    """What one kind of device tells. All in bytes."""

    def allocator(self) -> tuple[Known, Known]:
        """Allocated (tensors) and reserved (the caching allocator) now."""
        ...

    def peaks(self) -> tuple[Known, Known]:
        """The same at their peaks since the last reset; None where the device keeps no peak."""
        ...

    def driver(self) -> tuple[Known, Known]:
        """Used by this process, and used by everybody, now."""
        ...

    def capacity(self) -> Known:
        """What the device has in all."""
        ...

    def reset_peaks(self) -> None:
        """Let the peaks begin at what is there now."""
        ...


def device_counters(device: "torch.device") -> DeviceCounters:
    """The counters of a device; ROCm's is called "cuda" by torch."""
    if device.type == "cuda":
        return _Cuda(device)
    if device.type == "xpu":
        return _Xpu(device)
    return _Mps() if device.type == "mps" else _Untold()


def nvml_handle(device: "torch.device") -> Any:
    """NVML's handle of a device: by its UUID, for NVML counts cards that CUDA_VISIBLE_DEVICES hides
    from torch. Raises whatever NVML does.
    """
    import pynvml
    import torch

    pynvml.nvmlInit()
    uuid = torch.cuda.get_device_properties(device).uuid
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:  # a part of a card
        return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


class _Untold:
    """A device without counters: the CPU, whose memory is the process's."""

    def allocator(self) -> tuple[Known, Known]:
        return None, None

    def peaks(self) -> tuple[Known, Known]:
        return None, None

    def driver(self) -> tuple[Known, Known]:
        return None, None

    def capacity(self) -> Known:
        return None

    def reset_peaks(self) -> None:
        return


class _Mps(_Untold):
    """Metal: what tensors hold, and what the driver gave to this process. It keeps no peaks."""

    def allocator(self) -> tuple[Known, Known]:
        import torch

        return torch.mps.current_allocated_memory(), None

    def driver(self) -> tuple[Known, Known]:
        import torch

        return torch.mps.driver_allocated_memory(), None


class _Cuda:
    """CUDA and ROCm: torch's allocator; beside it NVML, or on ROCm AMD SMI, which do without a
    context.
    """

    def __init__(self, device: "torch.device") -> None:
        self._device = device

    def allocator(self) -> tuple[Known, Known]:
        return _of_allocator(self._module, self._device, "current")

    def peaks(self) -> tuple[Known, Known]:
        return _of_allocator(self._module, self._device, "peak")

    def driver(self) -> tuple[Known, Known]:
        if not self._module.is_initialized():
            return None, None
        import torch

        if torch.version.hip:
            return None, or_none(lambda: torch.cuda.device_memory_used(self._device))
        return or_none(self._process), or_none(self._used)

    def capacity(self) -> Known:
        if not self._module.is_initialized():
            return None
        return or_none(lambda: self._module.get_device_properties(self._device).total_memory)

    def reset_peaks(self) -> None:
        if self._module.is_initialized():  # before that there is no peak
            self._module.reset_peak_memory_stats(self._device)

    @property
    def _module(self) -> Any:
        import torch

        return torch.cuda

    @cached_property
    def _nvml(self) -> Any:
        """NVML's handle of the device; None where there is no NVML."""
        return or_none(lambda: nvml_handle(self._device))

    def _process(self) -> Known:
        """None also where the driver does not say (WSL, WDDM)."""
        import pynvml

        if self._nvml is None:
            return None
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self._nvml):
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
        return None

    def _used(self) -> Known:
        import pynvml

        return None if self._nvml is None else int(pynvml.nvmlDeviceGetMemoryInfo(self._nvml).used)


class _Xpu(_Cuda):
    """Intel: torch's allocator, and what is free on the device where the driver says it."""

    def driver(self) -> tuple[Known, Known]:
        if not self._module.is_initialized():
            return None, None
        return None, or_none(self._taken)

    @property
    def _module(self) -> Any:
        import torch

        return torch.xpu

    def _taken(self) -> int:
        free, total = self._module.mem_get_info(self._device)
        return int(total - free)


def _of_allocator(module: Any, device: "torch.device", when: str) -> tuple[Known, Known]:
    """Without a context torch gives no numbers, and nothing is allocated."""
    stats = module.memory_stats_as_nested_dict(device) if module.is_initialized() else {}
    allocated, reserved = (
        int(stats.get(name, {}).get("all", {}).get(when, 0))
        for name in ("allocated_bytes", "reserved_bytes")
    )
    return allocated, reserved


def or_none(ask: Any) -> Any:
    """The answer, or None: a counter that cannot be read must not end the work it measures."""
    try:
        return ask()
    except Exception:  # no driver library, no permission, a driver that does not say
        return None
