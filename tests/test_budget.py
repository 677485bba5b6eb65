"""A stage's budget: what is chosen keeps it, what is suggested works, what it costs is rounding."""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load_file

import lowvram
from lowvram import errors
from lowvram.artifacts import read_header
from lowvram.families.pixart import FAMILY
from lowvram.memory.budget import capped, find_room, parse_bytes
from lowvram.memory.count import LiveBytes
from lowvram.memory.plan import Need, Option, Room, choose
from lowvram.memory.rates import assumed
from lowvram.pixels.strategy import Pixels
from lowvram.repository import resolve
from lowvram.stages.options import transformer
from lowvram.stages.options.encoder import Texts, encoder_options
from lowvram.stages.options.pixels import pixels_options
from lowvram.stages.options.transformer import Placed, Steps, transformer_options
from lowvram.stages.savings import (
    EMBEDS,
    LADDER,
    MASK,
    Savings,
    chunk_feed_forward,
    real_tokens,
)
from lowvram.weights.checkpoint import Weights
from lowvram.weights.streamed import Streamed

T = TypeVar("T")
CPU = torch.device("cpu")
TEXT = {
    "prompt_embeds": torch.zeros(30, 4096),
    "prompt_attention_mask": torch.ones(30, dtype=torch.long),
}


def suggested(error: errors.RequestError) -> int:
    """The budget, in bytes, that a refusal names as the way out."""
    match = re.search(r"use --stage-budget (\d+)MiB", str(error))
    assert match, str(error)
    return int(match[1]) << 20


def place(stage: str, options: Callable[[Room], Iterable[Option[T]]], budget: int) -> Option[T]:
    """What a stage would choose within a budget."""
    room = find_room(CPU, 0, budget, assumed("cpu"))
    return choose(stage, options(room), room, 0, ", or another").option


@pytest.mark.parametrize(
    ("side", "guidance"),
    [(256, False), (512, True), (1024, True), (2048, False), (4096, True)],
)
def test_denoise_at_true_size(side: int, guidance: bool, true_sizes: Path) -> None:
    """At every size the least budget that a refusal names is one that works."""
    model = resolve(str(true_sizes))
    steps = Steps((1, 4, side // 8, side // 8), TEXT, guidance, 20)

    def options(asked: str) -> Callable[[Room], Iterable[Option[Placed]]]:
        return lambda room: transformer_options(model, asked, torch.float16, CPU, room, steps)

    with pytest.raises(errors.RequestError) as caught:
        place("denoise", options("auto"), 30_000_000)
    least = suggested(caught.value)
    assert place("denoise", options("auto"), least).name == "stream"
    with pytest.raises(errors.RequestError):
        place("denoise", options("auto"), int(0.98 * least))
    assert place("denoise", options("auto"), 16 << 30).name == "whole"
    if side == 1024:
        assert least <= 0.27e9
        chosen = place("denoise", options("stream"), 270_000_000).strategy.weights
        assert isinstance(chosen, Streamed) and chosen.unit == "block"


@pytest.mark.parametrize("tokens", [22, 300])
def test_encode_at_true_size(tokens: int, true_sizes: Path) -> None:
    model = resolve(str(true_sizes))

    def options(asked: str) -> Callable[[Room], Iterable[Option[Weights]]]:
        return lambda room: encoder_options(
            model, asked, torch.bfloat16, CPU, room, Texts(2, tokens)
        )

    chosen = place("encode", options("auto"), 250_000_000).strategy
    assert isinstance(chosen, Streamed) and chosen.unit == "matrix"
    assert (chosen.group > 1) == (tokens == 22)
    with pytest.raises(errors.RequestError) as caught:
        place("encode", options("stream"), 100_000_000)
    place("encode", options("stream"), suggested(caught.value))
    for asked in ("8bit", "4bit", "whole"):
        with pytest.raises(errors.RequestError, match="or another") as caught:
            place("encode", options(asked), 1 << 30)
        assert place("encode", options(asked), suggested(caught.value)).name == asked
    assert place("encode", options("auto"), 10 << 30).name == "whole"
    assert isinstance(block := place("encode", options("auto"), 1 << 30).strategy, Streamed)
    assert block.unit == "block"


@pytest.mark.parametrize("side", [256, 1024, 4096])
@pytest.mark.parametrize("asked", ["strips", "auto", "whole", "blended"])
def test_decode_suggestions_work(asked: str, side: int, true_sizes: Path) -> None:
    model, shape = resolve(str(true_sizes)), (1, 4, side // 8, side // 8)

    def options(room: Room) -> Iterable[Option[Pixels]]:
        return pixels_options(model, asked, torch.float16, CPU, room, shape)

    with pytest.raises(errors.RequestError) as caught:
        place("decode", options, 20_000_000)
    found = place("decode", options, suggested(caught.value))
    assert found.name == {"auto": "strips"}.get(asked, asked)


@pytest.mark.parametrize("savings", (*LADDER[1:], Savings("together", 3)), ids=str)
def test_savings_are_exact_up_to_rounding(
    savings: Savings, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeds = tmp_path / "x.embeds.safetensors"
    lowvram.encode("a red circle", str(tiny), output=embeds, dtype="fp32", padding="max")
    found = {}
    for name, chosen in (("plain", Savings()), ("saving", savings)):
        for weights in ("whole", "stream"):
            monkeypatch.setattr(transformer, "LADDER", (chosen,))
            path = tmp_path / f"{name}-{weights}.latents.safetensors"
            lowvram.denoise(
                embeds, output=path, steps=2, weights=weights, stage_budget=1 << 40, device="cpu"
            )
            settings = read_header(path).settings
            assert {k: settings[k] for k in chosen.settings()} == chosen.settings()
            found[name, weights] = load_file(path)["latents"]
    for weights in ("whole", "stream"):
        plain, saving = found["plain", weights], found["saving", weights]
        assert (saving - plain).norm() <= 1e-5 * plain.norm()
    assert torch.equal(found["saving", "whole"], found["saving", "stream"])


def test_savings_hold_less() -> None:
    """Each step down the ladder is one, in bytes that are really there."""
    from diffusers.models.attention import FeedForward

    tokens, layer = torch.randn(1, 1000, 32), FeedForward(32, activation_fn="gelu").eval()
    peaks, results = [], []
    for chunks in (1, 4, 16):
        chunked = FeedForward(32, activation_fn="gelu").eval()
        chunked.load_state_dict(layer.state_dict())
        chunk_feed_forward(torch.nn.Sequential(chunked), chunks)
        with torch.inference_mode(), LiveBytes("cpu") as live:
            results.append(chunked(tokens))
        peaks.append(live.peak)
    print(peaks)
    assert peaks[0] > 1.5 * peaks[1] and peaks[1] > 1.5 * peaks[2]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("saves", [True, False])
def test_masked_tokens_are_not_computed(
    saves: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text that the transformer sees ends with its last real token, where that is asked."""
    lengths = []
    real = type(FAMILY).predict

    def predict(self: object, network: object, latents: object, *rest: dict) -> object:
        lengths.append(rest[1]["prompt_embeds"].shape[1])
        return real(self, network, latents, *rest)

    monkeypatch.setattr(transformer, "LADDER", (LADDER[1] if saves else LADDER[0],))
    monkeypatch.setattr(type(FAMILY), "predict", predict)
    embeds = tmp_path / "x.embeds.safetensors"
    made = lowvram.encode("a red circle", str(tiny), output=embeds, padding="max")
    lengths.clear()
    lowvram.denoise(embeds, output=tmp_path / "x.latents.safetensors", steps=1)
    tokens = {item for name, item in made.items[0].items() if name.endswith("tokens")}
    assert set(lengths) - {300} == (tokens if saves else set())  # 300 is what is foretold with


def test_real_tokens_drops_masked_ones_at_the_end_only() -> None:
    text = {EMBEDS: torch.arange(5), MASK: torch.tensor([1, 0, 1, 0, 0]), "e": torch.arange(5)}
    assert real_tokens(text)[EMBEDS].tolist() == [0, 1, 2]
    assert real_tokens(text)["e"].tolist() == [0, 1, 2, 3, 4]  # not by token
    nothing = {EMBEDS: torch.arange(2), MASK: torch.zeros(2)}
    assert real_tokens(nothing)[EMBEDS].tolist() == [0]


@pytest.mark.parametrize(
    ("text", "size"),
    [("0.5GiB", 1 << 29), ("800MB", 800_000_000), ("2G", 2 << 30), (" 1.5 gb ", 1_500_000_000)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes("--stage-budget", text) == size


@pytest.mark.parametrize("text", ["", "5", "GiB", "-1GiB", "1TiBB", "nan MB", "9" * 400 + "GB"])
def test_odd_sizes_are_refused(text: str) -> None:
    with pytest.raises(errors.RequestError, match=r"--stage-budget .* is not a size"):
        parse_bytes("--stage-budget", text)


def test_a_budget_below_the_context_is_told_no_number_that_is_not_known() -> None:
    """What the stages need besides they say one by one."""
    said = r"0\.50 GB, assumed: lowvram doctor measures it\): use at least that, and what"
    with pytest.raises(errors.RequestError, match=said):
        find_room(torch.device("cuda"), 100 << 20, 0, assumed("cuda"))


def test_the_cap_names_the_card_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    caps: list[tuple[float, int]] = []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=100)
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda part, device: caps.append((part, device)),
    )
    for name, number in (("cuda", 3), ("cuda:1", 1)):
        caps.clear()
        with capped(torch.device(name), Room(50)):
            pass
        assert caps == [(0.51, number), (1.0, number)]  # a byte more, see the next test


# of cards with 24, 8 and 6 GB
@pytest.mark.parametrize("total", [25_757_220_864, 8_361_213_952, 6_441_730_048])
def test_a_cap_is_never_a_byte_less_than_the_room(
    total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch multiplies the part with the total in double precision, and cuts off."""
    caps: list[float] = []
    card = SimpleNamespace(total_memory=total)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda part, device: caps.append(part)
    )
    for room in range(64 << 20, 2 << 30, 2 << 20):
        with capped(torch.device("cuda:0"), Room(room)):
            pass
        assert room <= int(caps[-2] * total) <= room + 1


@pytest.mark.parametrize(
    "said",
    [
        "GET was unable to find an engine to execute this computation",
        "CUDA out of memory. Tried to allocate 20.00 MiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "miopenStatusAllocFailed",
        "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    ],
)
def test_what_libraries_say_without_memory_is_out_of_memory(said: str) -> None:
    assert errors.is_out_of_memory(RuntimeError(said))
    assert not errors.is_out_of_memory(ValueError(said))


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode", "encode-image", "plan", "other"])
def test_out_of_memory_anywhere_is_one_line(stage: str) -> None:
    expected = pytest.raises(errors.MemoryExhaustedError, match=f"^{stage} ran out of memory")
    with expected, errors.translated(stage):
        raise MemoryError("nothing left")


@pytest.mark.parametrize("measured", ["", "2026-11-27"])
def test_a_context_that_was_not_measured_is_said_to_be_assumed(measured: str) -> None:
    rates = replace(assumed("cuda"), measured=measured)
    room = find_room(torch.device("cuda"), 4 << 30, 0, rates)
    chosen = choose("encode", [Option("x", "whole", Need(100, 100))], room, 0, "")
    hint = "0.50 GB assumed for the context (lowvram doctor measures it)"
    assert (hint in chosen.reason) == (measured == "")
    of_tensors = find_room(torch.device("cuda"), 0, 4 << 30, rates)
    chosen = choose("encode", [Option("x", "whole", Need(1, 1))], of_tensors, 0, "")
    assert hint not in chosen.reason
