"""What oneDNN takes beside the tensors on a CPU, through torch's allocator: copies and sums in
layouts of its own.

Measured with torch 2.13 (oneDNN 3.12). A product in bfloat16 goes to oneDNN only where the CPU has
AVX-512, and with AVX512-BF16 to another kernel than without. AMX is not measured.
"""

import os
from math import prod

import torch
from torch import Tensor

_SMALLEST = 16**3  # products of no more multiplications than this torch does itself
_CHUNKS = 16  # blocks of columns that share a copy of rows


def convolution(value: Tensor, weight: Tensor, result: Tensor) -> int:
    """Bytes of copies of the input, the weights and the output with channels in lots of 8 or 16:
    the output's stays until it is copied back. Seen in the allocator's record.
    """
    lot = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    channels = -(-result.shape[1] // lot) * lot
    own = _bytes(result) // result.shape[1] * channels
    return max(own, _bytes(value) + _bytes(weight) + own - _bytes(result))


def product(value: Tensor, result: Tensor, weight_is_flat: bool) -> int:
    """Bytes of the scratch of a matrix product, of `value` with something, in bfloat16.

    Args:
        value: `[..., rows, depth]`.
        result: `[..., rows, columns]`.
        weight_is_flat: `[depth, columns]` for all of the batch, whose rows are then those of one.
    """
    if value.dtype != torch.bfloat16 or not _multiplies() or result.dim() < 2:
        return 0
    depth, columns = value.shape[-1], result.shape[-1]
    rows = prod(result.shape[:-1]) if weight_is_flat else result.shape[-2]
    if result.numel() * depth <= _SMALLEST:
        return 0
    if _has_bf16():
        return in_blocks(rows, depth, columns, torch.get_num_threads())
    return in_float32(rows, columns, result.numel() // (rows * columns), torch.get_num_threads())


def in_blocks(rows: int, depth: int, columns: int, threads: int) -> int:
    """With AVX512-BF16: each thread copies a block of 64 columns of the weight, in pairs of values,
    and sums up to 256 rows of it in float32. Exact for one thread in most shapes, never too little
    in 448 products (176 shapes, 1 to 4 threads); too much where threads get smaller blocks.
    What is rounded up and what is added are as oneDNN books them (`brgemm_matmul_utils.cpp`).
    """
    block = -(-rows // -(-rows // 256))
    deepest = 1024 if depth > 1024 else 512
    if torch.cpu._is_amx_tile_supported():
        deepest = depth  # AMX's kernel may copy all of it: read in oneDNN's source, not measured
    deep = min(depth, deepest)
    copied, padding = 2 * 64 * (-(-deep // 32) * 32), 384
    summed = 4 * block * min(64, columns)
    if rows >= 1024 and depth >= 4096 and depth & (depth - 1) == 0:
        # rows a power of two apart share lines of the cache: they are copied too
        copied, padding = copied + 2 * block * (deep + 32), 512
        summed *= min(_CHUNKS, -(-columns // 64))
    return padding + threads * (640 + copied + summed)


def in_float32(rows: int, columns: int, batch: int, threads: int) -> int:
    """With an AVX-512 without bfloat16: the result in float32, of a batch one for each thread."""
    return 4 * rows * columns * min(batch, threads) + 256 * (threads + 1)


def _multiplies() -> bool:
    """Whether torch gives products in bfloat16 to oneDNN; it heeds ONEDNN_MAX_CPU_ISA."""
    if not (torch.cpu._is_avx512_supported() and torch.backends.mkldnn.is_available()):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_bf16() -> bool:
    """Whether oneDNN uses AVX512-BF16; of a limit that was set torch does not tell."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    allowed = limit.upper() not in ("AVX512_CORE", "AVX512_CORE_VNNI")
    return allowed and torch.cpu._is_avx512_bf16_supported()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
