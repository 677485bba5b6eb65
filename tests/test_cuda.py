"""What only a CUDA GPU can show. Skipped where there is none; not yet run on one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lowvram
from lowvram import errors
from lowvram.families.pixart import FAMILY
from lowvram.weights.checkpoint import Loaded, find_class
from lowvram.weights.streamed import Streamed
from lowvram.weights.whole import Whole

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


@pytest.mark.parametrize("options", [{}, {"unit": "matrix", "group": 2}, {"window": 3}], ids=str)
@pytest.mark.parametrize("role", ["text_encoder", "transformer"])
def test_streamed_is_whole_bit_for_bit(role: str, options: dict, tiny: Path) -> None:
    component, device = FAMILY.component(role), torch.device("cuda")
    dtype = getattr(torch, component.dtype)
    network = find_class(component.class_name)
    ids = torch.arange(3, 20)[None]
    found = []
    for parks in (False, True) if role == "text_encoder" else (False,):
        for weights in (
            Whole(dtype),
            Streamed(dtype, component.blocks, parks=parks, repeats=not parks, **options),
            Streamed(dtype, component.blocks, parks=parks, repeats=True, keep=True),
        ):
            with torch.inference_mode():
                loaded = weights.load(network, tiny / component.subfolder, device)
                generator = torch.Generator().manual_seed(0)
                latents = torch.randn(1, 4, 32, 32, generator=generator).to(device, dtype)
                text = torch.randn(1, 9, 64, generator=generator).to(device, dtype)
                given = {
                    "prompt_embeds": text,
                    "prompt_attention_mask": torch.ones(1, 9, device=device),
                }
                timestep = torch.tensor(500, device=device)

                def call(
                    loaded: Loaded = loaded,
                    latents: torch.Tensor = latents,
                    given: dict = given,
                    timestep: torch.Tensor = timestep,
                ) -> torch.Tensor:
                    if role == "text_encoder":
                        here = ids.to(loaded.inputs)
                        made = FAMILY.encode(loaded.model, here, torch.ones_like(here))
                        return made["prompt_embeds"].cpu()
                    return FAMILY.predict(loaded.model, latents, timestep, given, 1.0).cpu()

                found += loaded.each([call, call], lambda done, total: None)
                loaded.close()
    assert all(torch.equal(each, found[0]) for each in found)


def test_strips_are_the_whole_decode_within_their_budget(tiny: Path, tmp_path: Path) -> None:
    made = lowvram.run("a red circle", str(tiny), tmp_path / "x.png", steps=1, device="cuda")
    latents, pictures = made.images[0].latents, {}
    for pixels in ("whole", "strips"):
        result = lowvram.decode(
            latents, output=tmp_path / f"{pixels}.png", decode=pixels, device="cuda", dtype="fp32",
            stage_budget=64 << 20,
        )  # fmt: skip
        assert result.report.peak_allocated_bytes <= 64 << 20
        pictures[pixels] = levels(result.paths[0])
    assert np.abs(pictures["whole"] - pictures["strips"]).max() <= 1


def test_a_gpu_that_is_not_there(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.DeviceError, match="use --device cpu or cuda"):
        lowvram.encode(
            "a cat", str(tiny), output=tmp_path / "x.embeds.safetensors", device="cuda:99"
        )
