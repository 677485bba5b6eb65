"""Which device and which dtype a stage uses, each with its reason. Imports torch when called."""

import logging
import os
import platform
from functools import cache
from typing import TYPE_CHECKING

from lowvram.errors import DeviceError, first_line

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
WITHOUT_FLOAT16 = {"cpu": "CPUs compute float16 slowly", "mps": "float16 overflows on MPS"}


def choose_device(name: str, warns: bool = False) -> "torch.device":
    """The device by name; "auto" takes the accelerator where there is one, else the CPU.

    Args:
        warns: log, once, that there is a card which this torch was not built for.

    Raises:
        DeviceError: no such device here.
    """
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        if warns and found is None:
            _warn_of_unseen_card()
        return found or torch.device("cpu")
    try:
        device = _named(name)
        if device.type not in ("cpu", found and found.type):
            raise ValueError("not an accelerator that torch finds")
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # what asks for no device in particular gets this one
        torch.empty(1, device=device)
    except Exception as error:
        there = ["cpu"] if found is None else ["cpu", found.type]
        raise DeviceError(
            f"no device {name!r} here ({first_line(error)[:100]}): "
            f"use --device {' or '.join(there)}"
        ) from None
    return device


@cache
def _warn_of_unseen_card() -> None:
    import torch

    from lowvram.memory.capacity import nvml_names

    if torch.version.cuda is None and torch.version.hip is None and (names := nvml_names()):
        log.warning(
            "%s is here, but torch %s is a build for CPUs: install the one for the card",
            names[0],
            torch.__version__,
        )


def _named(name: str) -> "torch.device":
    import torch

    try:
        return torch.device(name)
    except RuntimeError:  # lists all that torch was ever built for
        raise ValueError("not the name of a device") from None


def choose_dtype(
    asked: str, default: str, device: "torch.device", force_upcast: bool = False
) -> tuple["torch.dtype", str]:
    """The dtype in which a component computes, and why.

    Args:
        asked: "auto", "fp32", "bf16" or "fp16".
        default: the component's own, e.g. "float16".
        device: where it shall run.
        force_upcast: the VAE's own word that float16 overflows in it.
    """
    import torch

    if asked != "auto":
        return getattr(torch, DTYPE_NAMES[asked]), "as asked"
    if force_upcast:
        return torch.float32, "the VAE asks for it (force_upcast)"
    if default == "float16" and device.type in WITHOUT_FLOAT16:
        return torch.float32, WITHOUT_FLOAT16[device.type]
    # A plan may be for a card that is not here. What is only emulated counts: slow, and exact.
    here = device.type == "cuda" and torch.cuda.is_available()
    if default == "bfloat16" and here and not torch.cuda.is_bf16_supported():
        return torch.float32, "this GPU has no bfloat16, and float16 overflows in T5"
    return getattr(torch, default), "the model's default"


def device_name(device: "torch.device") -> str:
    """What the maker calls it: "NVIDIA H100 80GB HBM3"; for a CPU with the cores it may use."""
    if device.type == "cpu":
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        else:
            cores = os.cpu_count() or 1
        return f"{_processor()}, {cores} cores"
    if device.type in ("cuda", "xpu"):
        import torch

        module = torch.cuda if device.type == "cuda" else torch.xpu
        return str(module.get_device_properties(device).name)
    return f"{_processor()} ({device.type})"


def driver_version(device: "torch.device") -> str | None:
    """Of what lies between torch and the device; None for a CPU, or where nothing tells it.

    On ROCm it is the version of HIP, on MPS that of macOS.
    """
    if device.type == "mps":
        return platform.mac_ver()[0] or None
    if device.type not in ("cuda", "xpu"):
        return None
    import torch

    if device.type == "xpu":
        return str(torch.xpu.get_device_properties(device).driver_version)
    if torch.version.hip:
        return str(torch.version.hip)
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # no driver library
        return None


def dtype_name(dtype: "torch.dtype") -> str:
    """As in safetensors files and reports: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _processor() -> str:
    """The processor's name; its architecture where the system does not say more."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()
