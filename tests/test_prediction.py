"""Foretold peaks against torch's real CPU allocator; more in benchmarks/prediction.py."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import lowvram
from benchmarks.prediction import peak
from lowvram import component
from lowvram.memory.predict import Work, trace
from lowvram.stages.result import StageResult

PROMPT = "a large blue star on a yellow background"


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Peaks of the allocator while stages compute, beside their weights."""
    peaks: list[int] = []

    @contextmanager
    def recorded(device: Any, room: Any, weights: int) -> Iterator[None]:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            yield
        peaks.append(weights + peak(record))

    monkeypatch.setattr(component, "tracked", recorded)
    return peaks


def test_foretold_is_what_the_allocator_gives(allocated: list[int], tmp_path: Path) -> None:
    embeds, latents = tmp_path / "x.embeds.safetensors", tmp_path / "x.latents.safetensors"
    stages: list[tuple[Callable[[], StageResult], float]] = [
        (lambda: lowvram.encode(PROMPT, "demo", output=embeds), 0.02),
        (lambda: lowvram.encode(PROMPT, "demo", output=embeds, padding="max"), 0.02),
        (lambda: lowvram.denoise(embeds, output=latents, steps=2), 0.01),
        (lambda: lowvram.denoise(embeds, output=latents, steps=2, guidance_scale=1), 0.01),
        (lambda: lowvram.denoise(embeds, output=latents, steps=2, size=(192, 128)), 0.01),
        (lambda: lowvram.decode(latents, output=tmp_path / "x.png"), 0.02),
    ]
    for stage, under in stages:
        foretold = stage().report.predicted["peak_allocated_bytes"]
        print(foretold, allocated[-1], allocated[-1] / foretold - 1)
        assert (1 - under) * foretold <= allocated[-1] <= 1.01 * foretold
    assert len(allocated) == len(stages)
    assert torch.is_inference_mode_enabled() is False


@pytest.mark.parametrize("tokens", [296, 300])
def test_attention_with_a_bias_for_each_query_is_the_plain_one_on_cuda(tokens: int) -> None:
    """Not so with a mask that is one row for all queries."""

    def attend(rows: int) -> Work:
        def work(_: nn.Module, device: torch.device) -> object:
            query = torch.empty(1, 64, tokens, 64, dtype=torch.bfloat16, device=device)
            mask = torch.empty(1, 64, rows, tokens, dtype=torch.bfloat16, device=device)
            return nn.functional.scaled_dot_product_attention(query, query, query, mask)

        return work

    one, each = (
        trace(nn.Identity(), attend(rows), library="cudnn").activations for rows in (1, tokens)
    )
    plain = 4 * 64 * tokens * (3 * 64 + 2 * tokens)
    mask = 2 * 64 * tokens * (tokens - 1)
    assert each - one == plain + mask - 2 * 64 * tokens * 64  # in place of the result


# Rows, depth and columns: small, uneven, more than a block, and rows that are copied too.
_SHAPES = [(2, 16, 16), (9, 256, 128), (20, 33, 17), (301, 64, 64), (300, 1024, 256)]
_SHAPES += [(300, 1443, 34), (2048, 4096, 64)]

_PRODUCTS = f"""
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from benchmarks.prediction import peak
from lowvram.memory import onednn

for threads in (1, 2):
    torch.set_num_threads(threads)
    for rows, depth, columns in {_SHAPES}:
        value = torch.ones(rows, depth, dtype=torch.bfloat16)
        weight = torch.ones(columns, depth, dtype=torch.bfloat16)
        with torch.inference_mode(), profile(
            activities=[ProfilerActivity.CPU], profile_memory=True
        ) as record:
            result = torch.nn.functional.linear(value, weight)
        took = peak(record) - result.nbytes
        print(threads, rows, depth, columns, took, onednn.product(value, result, True))
"""


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE", "ALL"])
def test_scratch_of_products_in_bf16(instructions: str) -> None:
    """With the instructions that this CPU has, and without them."""
    ran = subprocess.run(
        [sys.executable, "-c", _PRODUCTS],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": instructions},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [[int(each) for each in line.split()] for line in ran.stdout.splitlines()]
    assert len(rows) == 2 * len(_SHAPES)
    for threads, *shape, took, foretold in rows:
        # what is over is a block of rows that is smaller than it may be
        assert took <= foretold <= took + threads * 128 * 256 + 512, (threads, shape)
