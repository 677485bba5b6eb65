"""Foretold peaks against torch's real CPU allocator; more in benchmarks/prediction.py."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import lowvram
from benchmarks.prediction import peak
from lowvram import component
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
