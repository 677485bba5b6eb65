"""What a machine is, what works on it and how fast it is: every check stands alone.

One that fails is a row that says so. Imports torch when called.
"""

import math
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import devices, embeds_cache, files, prepared, prepared_folders, selftests, versions
from lowvram.diagnosis import Diagnosis, Row, private_row
from lowvram.errors import StorageError, first_line
from lowvram.memory import capacity, rates, spill

if TYPE_CHECKING:
    import torch


def diagnose(quick: bool = False) -> Diagnosis:
    """Look at everything. Raises nothing for what it finds.

    Args:
        quick: show the rates that are remembered, and measure none.
    """
    checks: list[tuple[str, str, bool, Callable[[], Iterable[Row]]]] = [
        ("system", "system", False, _system),
        ("packages", "packages", True, _packages),
        ("device", "device", True, _device),
        ("memory", "device memory", False, _device_memory),
        ("memory", "RAM", False, _host_memory),
        # Before bitsandbytes is loaded: what the libraries take is measured in a fresh process.
        ("rates", "rates", False, partial(_rates, quick)),
        ("runs here", "bfloat16", True, _bfloat16),
        ("runs here", "int8", False, partial(_quantized, 8)),
        ("runs here", "nf4", False, partial(_quantized, 4)),
        ("runs here", "pinned memory", False, _pinned),
        ("caches", "downloads", False, _downloads),
        ("caches", "prepared", False, _prepared),
        ("caches", "embeds", False, _embeds),
    ]
    rows = [row for check in checks for row in _guarded(*check)]
    return Diagnosis(tuple(private_row(row) for row in rows))


def _guarded(
    group: str, name: str, needed: bool, check: Callable[[], Iterable[Row]]
) -> Iterator[Row]:
    """The rows of a check, and a row for how it failed if it did."""
    try:
        yield from check()
    except Exception as error:
        says = f"failed: {type(error).__name__}: {first_line(error)}"
        yield Row(group, name, says[:200], None, "failed", needed)


def _system() -> Iterator[Row]:
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield Row("system", "system", system, system)
    below = spill.windows_below()
    says = (
        f"{below}: what does not fit spills into system memory without an error, some 8 times "
        f"slower. To prevent it: {spill.NO_SPILL}"
    )
    state = "note" if below else "ok"
    yield Row("system", "Windows or WSL", says if below else "no", below, state)


def _packages() -> Iterator[Row]:
    own = metadata.version("lowvram")
    yield Row("packages", "lowvram", own, {"version": own, "needs": None})
    python = partial(_package, versions.check_python, platform.python_version())
    yield from _guarded("packages", "python", True, python)
    for needs in versions.requirements():
        name = re.split(r"[^\w.-]", needs)[0]
        yield from _guarded("packages", name, True, partial(_package, versions.check, needs))


def _package(check: Callable[[str], versions.Package], of: str) -> Iterator[Row]:
    package = check(of)
    value = {"version": package.version, "needs": package.needs}
    needs = package.needs.removeprefix(package.name)
    text = f"{package.version}  ({needs})"
    if package.state != "ok":
        found = "missing" if package.version is None else f"{package.version} is too old"
        way_out = f'pip install -U "{package.needs}"'
        text = f"{found}, needs {needs}: " + (
            way_out if package.name != "python" else "install a newer Python"
        )
    yield Row("packages", package.name, text, value, package.state, True)


def _device() -> Iterator[Row]:
    """The device that "auto" takes."""
    import torch

    device = devices.choose_device("auto")
    name = devices.device_name(device)
    value = {"name": name, "type": device.type, "count": _count(device)}
    text = f"{name} ({device.type})"
    unseen = capacity.nvml_names() if device.type == "cpu" else []
    if unseen:
        text += (
            f"; {unseen[0]} is here, but torch {torch.__version__} does not see it: install torch "
            "for CUDA (pytorch.org), or check CUDA_VISIBLE_DEVICES and the driver"
        )
    yield Row("device", "device", text, value, "note" if unseen else "ok")
    hip, cuda = torch.version.hip, torch.version.cuda
    built = f"ROCm {hip}" if hip else f"CUDA {cuda}" if cuda else None
    yield _known("device", "torch built for", built)
    yield _known("device", "driver", devices.driver_version(device))
    capability = None
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    yield _known("device", "compute capability", capability)


def _count(device: "torch.device") -> int:
    import torch

    return 1 if device.type == "cpu" else torch.accelerator.device_count()


def _device_memory() -> Iterator[Row]:
    device = devices.choose_device("auto")
    for counter in capacity.count_device(device):
        if counter.free is None and counter.total is None:
            yield Row("memory", counter.name, f"- ({counter.why})", None, "unknown")
        else:
            yield _memory(counter.name, counter.free, counter.total)
    free = capacity.free_bytes(device)
    text = "-" if free is None else f"{_size(free)} free: the least of these counters"
    yield Row("memory", "counted on", text, free, "unknown" if free is None else "ok")


def _host_memory() -> Iterator[Row]:
    import psutil

    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    yield _memory("RAM", memory.available, memory.total)
    yield _memory("swap", swap.free, swap.total)


def _memory(name: str, free: int | None, total: int | None) -> Row:
    text = f"{_size(free)} free of {_size(total)}"
    return Row("memory", name, text, {"free_bytes": free, "total_bytes": total})


def _rates(quick: bool) -> Iterator[Row]:
    name = str(devices.choose_device("auto"))
    found = rates.recall(name) if quick else rates.measure(name)
    when = Row("rates", "measured", "not yet: lowvram doctor, without --quick", None, "unknown")
    if found is not None:
        when = replace(when, text=found.measured, value=found.measured, state="ok")
        if not quick:
            try:
                rates.remember(name, found)
            except StorageError as error:
                when = replace(when, text=f"but not remembered: {error}", state="note")
    yield when
    disk = found and found.disk_bytes_per_second
    source = f" ({found.disk_source})" if found else ""
    yield _known("rates", "disk", disk, lambda n: f"{n / 1e9:.2f} GB/s{source}")
    transfer = found and found.transfer_bytes_per_second
    yield _known("rates", "host to device", transfer, lambda n: f"{n / 1e9:.1f} GB/s, pinned")
    for dtype in rates.DTYPES:
        flops = found and found.flops.get(dtype)
        yield _known("rates", f"{dtype} product", flops, _speed)
    yield _known("rates", "context", found and found.context_bytes, _size)
    yield _known("rates", "cuBLAS", found and found.cublas_bytes, _size)


def _bfloat16() -> Iterator[Row]:
    import torch

    device = devices.choose_device("auto")
    dtype, why = devices.choose_dtype("auto", "bfloat16", device)
    if dtype != torch.bfloat16:
        yield Row("runs here", "bfloat16", f"no, float32 instead: {why}", None, "note")
    else:
        yield _outcome("bfloat16", selftests.check_bfloat16(device), True)


def _quantized(bits: int) -> Iterator[Row]:
    device = devices.choose_device("auto")
    name = "int8" if bits == 8 else "nf4"
    needed = bits == 8 and device.type == "cuda"  # the published recipe takes it there
    check = partial(selftests.check_quantized, bits, device)
    yield from _guarded("runs here", name, needed, lambda: [_outcome(name, check(), needed)])


def _outcome(name: str, found: selftests.Outcome, needed: bool) -> Row:
    text = f"relative error {found.error:.2g}, at most {found.bound:g} is right"
    error = found.error if math.isfinite(found.error) else None  # JSON has no NaN
    value = {"error": error, "bound": found.bound}
    if found.works:
        return Row("runs here", name, f"yes ({text})", value, "ok", needed)
    return Row("runs here", name, f"computes nonsense ({text})", value, "failed", needed)


def _pinned() -> Iterator[Row]:
    pins = selftests.pins_memory(devices.choose_device("auto"))
    yield _known("runs here", "pinned memory", pins, lambda yes: "yes" if yes else "no")


def _downloads() -> Iterator[Row]:
    folder = files.hub_cache()
    # Snapshots are links into blobs, except where the system has none (Windows).
    size = sum(
        path.lstat().st_size
        for path in folder.glob("*/**/*")
        if path.is_file() and not path.is_symlink()
    )
    yield _cache("downloads", folder, size)


def _prepared() -> Iterator[Row]:
    size = sum(entry.bytes for entry in prepared.list_prepared())
    yield _cache("prepared", prepared_folders.cache_folder(), size)


def _embeds() -> Iterator[Row]:
    yield _cache("embeds", embeds_cache.cache_folder(), embeds_cache.total_bytes())


def _cache(name: str, folder: Path, size: int) -> Row:
    value = {"path": str(folder), "bytes": size}
    return Row("caches", name, f"{_size(size)}  {folder}", value)


def _known(group: str, name: str, value: Any, show: Callable[[Any], str] = str) -> Row:
    if value is None:
        return Row(group, name, "-", None, "unknown")
    return Row(group, name, show(value), value)


def _speed(flops: float) -> str:
    return f"{flops / 1e12:.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.1f} GFLOP/s"


def _size(number: int | None) -> str:
    return "?" if number is None else f"{number / 1e9:.2f} GB"
