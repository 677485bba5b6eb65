"""Memory on a CUDA GPU: caps are kept, peaks are as foretold, copies hide. Skipped without a GPU.

What is measured is noted where LOWVRAM_CUDA_REPORT says (measurements.py).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measurements import note
from PIL import Image
from torch import nn

import lowvram
from lowvram import component
from lowvram.families.pixart import FAMILY
from lowvram.memory.plan import Need, Room
from lowvram.memory.predict import Work
from lowvram.pixels.strips import StripDecode
from lowvram.repository import resolve
from lowvram.run import Picture
from lowvram.stages.options.encoder import Texts, encode_once, encoder_options
from lowvram.stages.options.pixels import ENCODER_HALF, decode_once, pixels_options
from lowvram.stages.options.transformer import Steps, step_once, transformer_options
from lowvram.stages.savings import LADDER
from lowvram.weights.checkpoint import build, find_class
from lowvram.weights.streamed import Streamed
from lowvram.weights.whole import Whole

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CUDA = torch.device("cuda")
BUDGET = 192 << 20
CUBLAS = 32 << 20
WAYS = [
    *(("encode", way) for way in ("whole", "8bit", "4bit", "stream")),
    *(("denoise", way) for way in ("whole", "stream")),
    *(("decode", way) for way in ("whole", "strips", "blended")),
]
HALF = torch.float16


@pytest.fixture(scope="module", params=["tiny", "demo"])
def made(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Picture]:
    """A model, and a picture of it with the files that it came from."""
    name = str(tiny) if request.param == "tiny" else "demo"
    path = tmp_path_factory.mktemp("made") / "x.png"
    result = lowvram.run("a red circle", name, path, steps=2, device="cuda", in_process=True)
    return name, result.images[0]


@pytest.mark.parametrize(("stage", "way"), WAYS)
def test_a_stage_keeps_its_budget(
    stage: str, way: str, made: tuple[str, Picture], tmp_path: Path
) -> None:
    model, picture = made
    options: dict[str, Any] = {"device": "cuda", "stage_budget": BUDGET}
    if stage == "encode":
        output = tmp_path / "x.embeds.safetensors"
        result = lowvram.encode("a red circle", model, output=output, weights=way, **options)
    elif stage == "denoise":
        output = tmp_path / "x.latents.safetensors"
        result = lowvram.denoise(picture.embeds, output=output, weights=way, steps=2, **options)
    else:
        result = lowvram.decode(picture.latents, output=tmp_path / "x.png", decode=way, **options)
    report = result.report.to_json()
    peaks = {name: value for name, value in report.items() if name.startswith("peak_")}
    note(test="budget", model=Path(model).name, stage=stage, way=way, predicted=report["predicted"],
         left=report["left_allocated_bytes"], **peaks)  # fmt: skip
    assert report["peak_allocated_bytes"] <= BUDGET
    assert report["peak_reserved_bytes"] <= BUDGET
    assert report["left_allocated_bytes"] < 1 << 20


def test_strips_in_little_room_are_the_whole_decode(tiny: Path, tmp_path: Path) -> None:
    made = lowvram.run(
        "a red circle", str(tiny), tmp_path / "x.png", steps=1, device="cuda", in_process=True
    )
    pictures = {}
    for pixels, budget in (("whole", None), ("strips", 64 << 20)):
        result = lowvram.decode(
            made.images[0].latents, output=tmp_path / f"{pixels}.png", decode=pixels,
            device="cuda", dtype="fp32", stage_budget=budget,
        )  # fmt: skip
        if budget:
            assert result.report.peak_reserved_bytes <= budget
        with Image.open(result.paths[0]) as image:
            pictures[pixels] = np.asarray(image).astype(int)
    assert np.abs(pictures["whole"] - pictures["strips"]).max() <= 1


def test_out_of_memory_goes_a_step_down(
    made: tuple[str, Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capped = component.capped

    @contextmanager
    def lower(device: torch.device, room: Room) -> Iterator[None]:
        with capped(device, Room(8 << 20, "--stage-budget")):
            yield

    monkeypatch.setattr(component, "capped", lower)  # of this process, not of the next one
    result = lowvram.decode(
        made[1].latents, output=tmp_path / "x.png", device="cuda", step_down=True
    )
    assert result.report.weights == "strips"
    assert "after whole ran out of memory" in result.report.reasons[0]
    assert result.paths[0].exists()


def test_whole_networks_of_true_size_take_what_was_foretold(true_sizes: Path) -> None:
    model, room = resolve(str(true_sizes)), Room(0, libraries=CUBLAS)
    ratios = []
    for side in (64, 128):
        steps, shape = _steps(side), (1, 4, side, side)
        for placed in transformer_options(model, "whole", HALF, CUDA, room, steps):
            work = step_once(FAMILY, placed.strategy.savings, steps, "")
            ratios.append(_ratio("transformer", HALF, f"{side} {placed.says}", placed.need, work))
        for dtype in (HALF, torch.float32):
            (pixels, *_) = pixels_options(model, "whole", dtype, CUDA, room, shape)
            ratios.append(_ratio("vae", dtype, str(side), pixels.need, decode_once(shape, dtype)))
    for tokens in (20, 296, 300):  # of which 296 are a multiple of 8, to which kernels are tuned
        _note_attention(tokens)
        texts, dtype = Texts(1, tokens), torch.bfloat16
        (weights, *_) = encoder_options(model, "whole", dtype, CUDA, room, texts)
        work = encode_once(FAMILY, tokens)
        ratios.append(_ratio("text_encoder", dtype, str(tokens), weights.need, work))
    assert max(ratios) <= 1.1


@pytest.mark.parametrize(
    ("dtype", "side"), [(HALF, 64), (HALF, 128), (torch.float32, 128)], ids=str
)
def test_strips_of_the_published_vae(dtype: torch.dtype, side: int, true_sizes: Path) -> None:
    model, shape = resolve(str(true_sizes)), (1, 4, side, side)
    vae: Any = _network("vae", dtype)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    with component.exact_float32():
        _, seconds, whole = _measured(
            lambda: vae.decode(latents.to(CUDA), return_dict=False)[0].cpu()
        )
    for budget in ((256 if dtype == HALF else 384) << 20, 512 << 20):
        room = Room(budget, "--stage-budget", libraries=CUBLAS)
        option = next(iter(pixels_options(model, "strips", dtype, CUDA, room, shape)))
        assert isinstance(option.strategy, StripDecode)
        component.flush(CUDA)
        with component.exact_float32(), component.capped(CUDA, room):
            peak, took, found = _measured(
                lambda option=option: option.strategy.decode(vae, latents, CUDA, lambda *_: None)
            )
        error = float((found.float() - whole.float()).abs().max() / whole.float().abs().max())
        note(test="strips", dtype=str(dtype), side=side, budget=budget, allocated=peak,
             predicted=option.need.allocated, reserved=torch.cuda.max_memory_reserved(),
             predicted_reserved=option.need.reserved, room=option.strategy.room_bytes,
             seconds=took, whole_seconds=seconds, error=error)  # fmt: skip
        assert torch.cuda.max_memory_reserved() <= budget
        # What is foretold has an allowance for what an H100 held beyond the rehearsal in 256 MiB;
        # why it did is not known, so in another room a little may be missing.
        assert peak <= 1.02 * option.need.allocated
        assert error < (2e-2 if dtype == HALF else 1e-4)


def test_copies_hide_behind_the_computation(tmp_path: Path) -> None:
    config = dict(FAMILY.published_configs["transformer"]) | {"num_layers": 8}
    part, network = (
        FAMILY.component("transformer"),
        find_class("diffusers.PixArtTransformer2DModel"),
    )
    with CUDA:
        build(network, config, HALF).save_pretrained(tmp_path)
    seconds: dict[str, float] = {}
    ways = {"resident": Whole(HALF), "stream": Streamed(HALF, part.blocks, repeats=True, keep=True)}
    size, sides = 0, (64, 128, 256)
    with torch.inference_mode():
        for name, weights in ways.items():
            loaded = weights.load(network, tmp_path, CUDA)
            if isinstance(weights, Streamed):
                size = weights.moving(loaded.model)
            for side in sides:
                step = partial(step_once(FAMILY, LADDER[0], _steps(side), ""), loaded.model, CUDA)
                for _ in range(3):  # the files are read in the first
                    step()
                took, handed = _step_seconds(step)
                seconds[f"{name} {8 * side} px"] = took
                note(test="overlap", way=name, side=side, seconds=took, host_seconds=handed)
            del step
            loaded.close()
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=CUDA)
    copies = min(_measured(lambda: there.copy_(host))[1] for _ in range(4))
    note(test="overlap", bytes=size, copies=copies)
    for side in sides[1:]:  # at 512 px the copies take longer than the computation
        resident, stream = (seconds[f"{name} {8 * side} px"] for name in ways)
        assert stream < resident + 0.7 * copies, f"{8 * side} px: {seconds}, copies {copies}"


def _step_seconds(step: Callable[[], Any], count: int = 6) -> tuple[float, float]:
    """Of a step among several, in all and until the host has handed its work out."""
    torch.cuda.synchronize()
    start, handed = time.perf_counter(), 0.0
    for _ in range(count):
        before = time.perf_counter()
        step()
        handed += time.perf_counter() - before
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count, handed / count


def _note_attention(tokens: int) -> None:
    """Which way torch takes for T5's attention, and what that takes."""
    query = torch.zeros(1, 64, tokens, 64, dtype=torch.bfloat16, device=CUDA)
    mask = torch.zeros(1, 64, tokens, tokens, dtype=torch.bfloat16, device=CUDA)
    before = torch.cuda.memory_allocated()
    asked = torch.backends.cuda.SDPAParams(query, query, query, mask, 0.0, False, False)
    attend = partial(nn.functional.scaled_dot_product_attention, query, query, query, mask)
    peak, _, _ = _measured(attend)
    note(test="attention", tokens=tokens, took=peak - before,
         kernel=torch._fused_sdp_choice(query, query, query, mask),
         efficient=torch.backends.cuda.can_use_efficient_attention(asked),
         cudnn=torch.backends.cuda.can_use_cudnn_attention(asked))  # fmt: skip


def _steps(side: int) -> Steps:
    """One step of one picture with guidance; `side` of its latents."""
    text = {
        "prompt_embeds": torch.zeros(120, 4096),
        "prompt_attention_mask": torch.ones(120, dtype=torch.long),
    }
    return Steps((1, 4, side, side), text, True, 1)


def _network(role: str, dtype: torch.dtype) -> nn.Module:
    """Of its published size, with random weights, made on the GPU."""
    part = FAMILY.component(role)
    with CUDA:
        made = build(find_class(part.class_name), FAMILY.published_configs[role], dtype)
    for half in ENCODER_HALF if role == "vae" else ():
        setattr(made, half, None)
    return made


def _ratio(role: str, dtype: torch.dtype, size: str, need: Need, work: Work) -> float:
    """The peak of a piece of work, to the one that was foretold."""
    network = _network(role, dtype)
    component.flush(CUDA)
    with component.exact_float32():
        peak, seconds, _ = _measured(partial(work, network, CUDA))
    reserved = torch.cuda.max_memory_reserved()
    weights = sum(each.numel() * each.element_size() for each in network.parameters())
    note(test="foretold", role=role, dtype=str(dtype), size=size, weights=weights, allocated=peak,
         predicted_allocated=need.allocated, reserved=reserved,
         predicted_reserved=need.reserved, seconds=seconds)  # fmt: skip
    del network
    component.flush(CUDA)
    return peak / need.allocated


def _measured(work: Callable[[], Any]) -> tuple[int, float, Any]:
    """Peak bytes allocated, seconds, and what came of it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with torch.inference_mode():
        found = work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), time.perf_counter() - start, found
