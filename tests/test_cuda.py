"""What only a CUDA GPU can show. Skipped where there is none; not yet run on one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lowvram
from lowvram import errors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def levels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def test_peaks_are_known_and_nothing_stays(tiny: Path, tmp_path: Path) -> None:
    result = lowvram.run("a red circle", str(tiny), tmp_path, steps=2, device="cuda")
    assert [stage["weights"] for stage in result.stages] == ["8bit", "whole", "whole"]
    assert [stage["dtype"] for stage in result.stages] == ["bfloat16", "float16", "float16"]
    for stage in result.stages:
        assert stage["weights_bytes"] <= stage["peak_allocated_bytes"]
        assert stage["peak_allocated_bytes"] <= stage["peak_reserved_bytes"]
        assert stage["peak_reserved_bytes"] <= stage["peak_device_bytes"]
        if stage["peak_process_bytes"] is not None:
            assert stage["peak_reserved_bytes"] < stage["peak_process_bytes"]
        assert stage["left_behind"] == []
        assert stage["left_allocated_bytes"] < 1 << 20


def test_in_process_stages_leave_the_device_as_they_found_it(tiny: Path, tmp_path: Path) -> None:
    left = []
    for _ in range(3):
        lowvram.run("a red circle", str(tiny), tmp_path, steps=1, device="cuda", in_process=True)
        left.append(torch.cuda.memory_allocated())
    assert left[1] == left[2]


def test_same_picture_as_on_the_cpu(tiny: Path, tmp_path: Path) -> None:
    made = {}
    for device in ("cpu", "cuda"):
        result = lowvram.run(
            "a red circle",
            str(tiny),
            tmp_path / f"{device}.png",
            steps=3,
            device=device,
            dtype="fp32",
            encoder_weights="whole",
            in_process=True,
        )
        made[device] = levels(result.images[0].path)
    assert np.abs(made["cpu"] - made["cuda"]).max() <= 2


def test_a_gpu_that_is_not_there(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.DeviceError, match="use --device cpu or cuda"):
        lowvram.encode(
            "a cat", str(tiny), output=tmp_path / "x.embeds.safetensors", device="cuda:99"
        )
