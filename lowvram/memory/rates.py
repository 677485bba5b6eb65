"""How fast a machine reads, copies and multiplies, and what its libraries take: for the planner.

Measured once, then remembered in rates.json in the user's cache, under the names of device, torch
and driver: another card or driver is another entry. Where nothing was measured there are
cautious assumptions. What is not known is None.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.artifacts import write_bytes
from lowvram.devices import device_name, driver_version
from lowvram.files import user_cache
from lowvram.memory.counters import device_counters
from lowvram.memory.disk import ASSUMED, measure_disk

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
FORMAT_VERSION = 1

_COPIED_BYTES = 64 << 20  # 3 ms over PCIe 4: long against the 10 µs of starting a copy
_REPEATS = 5
_REPEAT_SECONDS = 0.15  # no more repeats after them
_PRODUCT_SECONDS = 0.3  # what a matrix product may take
_CPU_SIDES = (256, 2048)  # of the matrices: the first that is tried, and the last
_GPU_SIDES = (2048, 4096)


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, and what its libraries take.

    Attributes:
        disk_bytes_per_second: reading a large file that is not in memory, from its start.
        disk_source: what was read, "assumed" where nothing was.
        transfer_bytes_per_second: from pinned host memory to the device; None on a CPU, and where
            host memory cannot be pinned.
        flops: floating-point operations a second of a large matrix product, by dtype; a dtype that
            the device does not have is left out.
        context_bytes: what the driver counts for a process beyond what the allocator reserved,
            after a matrix product and a convolution; None where NVML does not say.
        cublas_bytes: what the first matrix product allocates beyond its tensors; None on a CPU.
        measured: the day in UTC, "2026-11-25"; "" for assumptions.
    """

    disk_bytes_per_second: float
    disk_source: str
    transfer_bytes_per_second: float | None
    flops: Mapping[str, float]
    context_bytes: int | None
    cublas_bytes: int | None
    measured: str

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "flops": dict(self.flops)}

    @staticmethod
    def from_json(value: Any) -> "Rates":
        """What `to_json` made.

        Raises:
            ValueError: it is something else.
        """
        try:
            rates = Rates(**value)
            rated = [rates.disk_bytes_per_second, *rates.flops.values()]
            rated += [n for n in [rates.transfer_bytes_per_second] if n is not None]
            counted = [n for n in (rates.context_bytes, rates.cublas_bytes) if n is not None]
            sane = (
                all(math.isfinite(n) and n > 0 for n in rated)
                and all(type(n) is int and n >= 0 for n in counted)
                and {"float32"} <= set(rates.flops) <= set(DTYPES)
                and all(isinstance(s, str) for s in (rates.disk_source, rates.measured))
            )
        except (TypeError, AttributeError):
            sane = False
        if not sane:
            raise ValueError("these are no rates")
        return rates


def assumed(device_type: str) -> Rates:
    """Cautious rates of a machine that was not measured.

    Args:
        device_type: torch's: "cpu", "cuda", "xpu" or "mps".
    """
    if device_type == "cpu":
        # T5-XXL with 300 tokens, 2.8 TFLOP, takes 71 s of float32 on two cores. A processor that
        # has no half precision (AVX2 only, two cores) does 1.4 GFLOP/s in it.
        flops = {"float32": 40e9, "bfloat16": 1.2e9, "float16": 1.2e9}
        return Rates(ASSUMED, "assumed", None, flops, None, None, "")
    # Computed, not measured: an RTX 3050 laptop (4 GB) takes some 67 ms for a PixArt block of
    # 0.475 TFLOP in half precision; float32 at half that rate.
    flops = {"float32": 3.5e12, "bfloat16": 7e12, "float16": 7e12}
    if device_type == "mps":  # one memory for both: nothing is carried
        return Rates(ASSUMED, "assumed", None, flops, None, None, "")
    # PCIe 3 x16 carries 15.75 GB/s, of which pinned copies reach 12. Half a GB for a context with
    # its kernels is a guess, on the large side; torch gives cuBLAS 32 MiB on Hopper and 8 elsewhere
    # (CUDABlas.cpp).
    return Rates(ASSUMED, "assumed", 12e9, flops, 500_000_000, 32 << 20, "")


def recall(device: str) -> Rates | None:
    """What was measured of this device with this torch and this driver; None where nothing was.

    Args:
        device: torch's name, "cuda:0".
    """
    try:
        return Rates.from_json(_entries()[_key(device)])
    except (KeyError, ValueError):
        return None


def remember(device: str, rates: Rates) -> None:
    """Keep what was measured. Of two processes at once the later wins: nothing worse is lost than
    a measurement.

    Raises:
        StorageError: the cache cannot be written.
    """
    entries = {**_entries(), _key(device): rates.to_json()}
    document = {"version": FORMAT_VERSION, "rates": entries}
    write_bytes(_path(), json.dumps(document, indent=2).encode())


def measure(device: str) -> Rates:
    """Measure a device and the disk of the caches: about three seconds.

    Meant for a process that has done nothing on the device yet: what its libraries take is then
    what a stage will find.
    """
    import torch

    place = torch.device(device)
    cublas, context = (None, None) if place.type == "cpu" else _libraries(place)
    flops = {}
    for name in DTYPES:
        with suppress(Exception):  # no such dtype here, or no room for its matrices
            flops[name] = _matmul_rate(place, getattr(torch, name))
    flops.setdefault("float32", assumed(place.type).flops["float32"])  # what others fall back on
    transfer = None if place.type in ("cpu", "mps") else _transfer_rate(place)
    if place.type != "cpu":
        with suppress(RuntimeError):  # not every backend can
            torch.accelerator.empty_cache()
    disk, source = measure_disk()
    today = datetime.now(UTC).date().isoformat()
    return Rates(disk, source, transfer, flops, context, cublas, today)


def _path() -> Path:
    return user_cache() / "rates.json"


def _key(device: str) -> str:
    from importlib.metadata import version

    import torch

    place = torch.device(device)
    driver = driver_version(place) or "-"
    return f"{device_name(place)} | torch {version('torch')} | driver {driver}"


def _entries() -> dict[str, Any]:
    """What the file holds; nothing where it is missing, damaged or not ours."""
    try:
        document = json.loads(_path().read_text(encoding="utf-8"))
        if document["version"] == FORMAT_VERSION:
            return dict(document["rates"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    return {}


def _libraries(device: "torch.device") -> tuple[int | None, int | None]:
    """Bytes of cuBLAS and of the context; None where they are not told."""
    import torch

    if device.type != "cuda":
        return None, None
    with suppress(AttributeError):  # no public name: an earlier product's, if there was one
        torch._C._cuda_clearCublasWorkspaces()
    matrix = torch.ones(256, 256, device=device)
    product = torch.empty_like(matrix)
    before = torch.cuda.memory_allocated(device)
    torch.mm(matrix, matrix, out=product)
    cublas = torch.cuda.memory_allocated(device) - before
    torch.conv2d(matrix.view(1, 4, 128, 128), torch.ones(4, 4, 3, 3, device=device))
    # What streams copies on a stream of its own, with which a process takes 73 MB more on an H100.
    with torch.cuda.stream(torch.cuda.Stream(device)), suppress(RuntimeError):
        product.copy_(torch.ones(256, 256, pin_memory=True), non_blocking=True)
    torch.cuda.synchronize(device)
    process, _ = device_counters(device).driver()
    if process is None:
        return cublas, None
    return cublas, max(0, process - torch.cuda.memory_reserved(device))


def _matmul_rate(device: "torch.device", dtype: "torch.dtype") -> float:
    """Operations a second of the largest product that is done in time."""
    import torch

    side, last = _CPU_SIDES if device.type == "cpu" else _GPU_SIDES
    rate, seconds = 0.0, 0.0
    while side <= last and 8 * seconds <= _PRODUCT_SECONDS:
        try:
            a, b, c = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(3))
            product = partial(torch.mm, a, b, out=c)
            product()  # loads kernels, starts threads
        except RuntimeError:
            if not rate:
                raise
            break  # no room for larger ones
        seconds = _least_seconds(product, device)
        rate, side = 2 * side**3 / seconds, 2 * side
    return rate


def _transfer_rate(device: "torch.device") -> float | None:
    import torch

    try:
        host = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(host, device=device)
    except RuntimeError:  # a device or a system without pinned memory, or too little of either
        return None
    there.copy_(host)
    copy = partial(there.copy_, host, non_blocking=True)
    return _COPIED_BYTES / _least_seconds(copy, device)


def _least_seconds(work: Callable[[], object], device: "torch.device") -> float:
    """The best of a few: what disturbs makes it slower, nothing makes it faster."""
    import torch

    least, spent = math.inf, 0.0
    for _ in range(_REPEATS):
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds = time.perf_counter() - start
        least, spent = min(least, seconds), spent + seconds
        if spent > _REPEAT_SECONDS:
            break
    return least
