"""What only a CUDA GPU can show; memory is test_cuda_memory.py. Skipped without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from interrupting import interrupt_denoise
from measurements import note
from PIL import Image
from safetensors.torch import load_file

import lowvram
from lowvram import errors
from lowvram.families.pixart import FAMILY
from lowvram.memory.pinned import PinnedMemory
from lowvram.weights.checkpoint import Loaded, find_class
from lowvram.weights.streamed import Streamed
from lowvram.weights.whole import Whole

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def levels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def test_peaks_are_known_and_nothing_stays(tiny: Path, tmp_path: Path) -> None:
    result = lowvram.run("a red circle", str(tiny), tmp_path, steps=2, device="cuda")
    assert [stage["weights"] for stage in result.stages] == ["whole", "whole", "whole"]
    assert [stage["dtype"] for stage in result.stages] == ["bfloat16", "float16", "float16"]
    for stage in result.stages:
        note(test="peaks", **{k: v for k, v in stage.items() if k not in ("timeline", "marks")})
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


@pytest.mark.parametrize("model", ["tiny", "demo"])
def test_same_picture_as_on_the_cpu(model: str, tiny: Path, tmp_path: Path) -> None:
    made, name = {}, str(tiny) if model == "tiny" else model
    for device in ("cpu", "cuda"):
        result = lowvram.run(
            "a red circle",
            name,
            tmp_path / f"{device}.png",
            steps=4,
            device=device,
            dtype="fp32",
            encoder_weights="whole",
            in_process=True,
        )
        made[device] = levels(result.images[0].path)
    difference = np.abs(made["cpu"] - made["cuda"])
    note(test="picture", model=model, most=int(difference.max()), mean=float(difference.mean()))
    assert difference.max() <= 4


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


@pytest.mark.parametrize(("bits", "least"), [(8, 0.99), (4, 0.9)])
def test_quantised_embeddings_are_near_the_whole_ones(
    bits: int, least: float, tmp_path: Path
) -> None:
    made = {}
    for weights in ("whole", f"{bits}bit"):
        path = tmp_path / f"{weights}.embeds.safetensors"
        prompt = "a large blue star on a yellow background"
        lowvram.encode(prompt, "demo", output=path, weights=weights, device="cuda")
        made[weights] = load_file(path)["0.prompt_embeds"].float()
    cosine = torch.cosine_similarity(*made.values(), dim=-1)
    note(test="cosine", bits=bits, least=float(cosine.min()), mean=float(cosine.mean()))
    assert cosine.min() > least


def test_a_gpu_that_is_not_there(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.DeviceError, match="use --device cpu or cuda"):
        lowvram.encode(
            "a cat", str(tiny), output=tmp_path / "x.embeds.safetensors", device="cuda:99"
        )


def test_a_process_is_forked_before_the_driver_starts() -> None:
    script = """
import os
from lowvram import worker
forks = worker._preload()
print("forks:", forks, flush=True)
if forks:
    child = os.fork()
    if child == 0:
        import torch
        import diffusers.models.modeling_utils
        os._exit(0 if float(torch.ones(2, device="cuda").sum()) == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    done = _run([sys.executable, "-c", script])
    note(test="fork", forks="forks: True" in done.stdout, stderr=done.stderr[-300:])
    assert done.returncode == 0, done.stderr
    assert "forks: True" in done.stdout  # else each stage pays for its imports


def test_which_import_starts_the_driver() -> None:
    """Notes it; what the worker imports before it forks has to leave the driver alone."""
    script = """
import importlib, json, os, time
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
names = ["torch", "torch.accelerator", "transformers", "transformers.modeling_utils", "triton",
         "bitsandbytes", "diffusers", "diffusers.models.modeling_utils"]
for name in names:
    start, failed = time.perf_counter(), ""
    try:
        module = importlib.import_module(name)
        if name == "torch.accelerator":
            module.is_available()
    except Exception as error:
        failed = repr(error)[:200]
    import torch
    open_ = set()
    for each in os.listdir("/proc/self/fd"):
        try:
            open_.add(os.readlink(f"/proc/self/fd/{each}"))
        except OSError:
            pass
    print(json.dumps({
        "after": name, "seconds": time.perf_counter() - start, "failed": failed,
        "devices": sorted(path for path in open_ if path.startswith("/dev/nvidia")),
        "initialized": torch.cuda.is_initialized(),
    }), flush=True)
"""
    done = _run([sys.executable, "-c", script])
    steps = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    note(test="driver", steps=steps, stderr=done.stderr[-300:])
    assert done.returncode == 0, done.stderr


def test_whether_diffusers_without_bitsandbytes_leaves_the_driver_alone() -> None:
    """Notes it: the worker could then import it before it forks, some 2 s for each stage."""
    script = """
import json, os, sys, time
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
sys.modules["bitsandbytes"] = None
start = time.perf_counter()
from diffusers import AutoencoderKL, PixArtTransformer2DModel
seconds = time.perf_counter() - start
del sys.modules["bitsandbytes"]
opened = [os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")]
devices = sorted({path for path in opened if path.startswith("/dev/nvidia")})
child = os.fork()
if child == 0:
    import torch
    from transformers.utils import is_bitsandbytes_available
    fine = is_bitsandbytes_available() and float(torch.ones(2, device="cuda").sum()) == 2
    os._exit(0 if fine else 1)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps({"seconds": seconds, "devices": devices, "child": code}))
"""
    done = _run([sys.executable, "-c", script])
    assert done.returncode == 0, done.stderr
    note(test="preload", **json.loads(done.stdout.splitlines()[-1]))


def test_memory_that_was_registered_is_pinned() -> None:
    memory = PinnedMemory(torch.device("cuda"))
    lent = memory.empty(42_500_000)
    assert lent.is_pinned()
    lent.fill_(7)
    there = lent.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert int(there.min()) == 7
    memory.close()
    assert not lent.is_pinned()


def test_the_command_line_makes_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    done = _run(
        [sys.executable, "-m", "lowvram", "run", "a red circle", "-m", "demo", "--device", "cuda",
         "--steps", "4", "-o", str(picture), "--json"]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)["stages"]
    assert {stage["device"] for stage in stages} == {"cuda"}
    assert levels(picture).std() > 1
    note(test="command line", seconds=[stage["seconds"] for stage in stages], said=done.stderr)


def test_doctor_measures_this_gpu() -> None:
    done = _run([sys.executable, "-m", "lowvram", "doctor", "--json"])
    note(test="doctor", rc=done.returncode, document=done.stdout, said=done.stderr[-500:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CUDA" in done.stdout


def test_interrupt_leaves_nothing_on_the_gpu(tiny: Path, tmp_path: Path) -> None:
    # The memory of a process ends with it: none may be left.
    started, said = interrupt_denoise(tiny, tmp_path / "x.png", "--device", "cuda")
    assert started
    assert said.endswith("lowvram: interrupted")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=90)
