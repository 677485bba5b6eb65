"""Strips on CUDA's streams, without CUDA: every copy is made as late as the streams allow.

A stream of ours keeps its copies until someone waits for them, so a map that is overwritten too
early, or read before it is written, gives other pixels. Memory is counted with the copies ahead.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram.families.pixart import FAMILY
from lowvram.memory.count import LiveBytes, fake_device
from lowvram.memory.plan import Room
from lowvram.memory.predict import trace, without_storage
from lowvram.pixels import room, transfers
from lowvram.pixels.attention import attend
from lowvram.pixels.feature_maps import InRam, Store
from lowvram.pixels.layers import AttentionPass, ConvPass, decoder_passes, encoder_passes
from lowvram.pixels.passes import convolve
from lowvram.pixels.rehearsal import rehearse
from lowvram.pixels.room import Chunks
from lowvram.pixels.strips import Direction, StripDecode, least_room
from lowvram.pixels.transfers import CudaTransfers
from lowvram.repository import resolve
from lowvram.stages.options.pixels import pixels_options
from lowvram.weights.checkpoint import build

CPU = torch.device("cpu")


class Late(TorchDispatchMode):
    """Copies inside `with torch.cuda.stream(…)` go to that stream's list."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if Stream.current is not None and func is torch.ops.aten.copy_.default:
            Stream.current.work.append(partial(func, *args, **(kwargs or {})))
            return args[0]
        return func(*args, **(kwargs or {}))


class Stream:
    """Does nothing before it is waited for; an event is how much is to be done until then."""

    current: "Stream | None" = None

    def __init__(self, device: object = None) -> None:
        self.work: list[Callable[[], object]] = []
        self.done = 0

    def record_event(self) -> tuple["Stream", int]:
        return self, self.done + len(self.work)

    def wait_event(self, event: tuple["Stream", int]) -> None:
        stream, until = event
        while stream.done < until:
            stream.work.pop(0)()
            stream.done += 1

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.wait_event(self.record_event())


@contextmanager
def on(stream: Stream) -> Iterator[None]:
    Stream.current = stream
    yield
    Stream.current = None


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """`CudaTransfers` on our streams. What is computed is computed at once."""
    computing = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(transfers, "transfers_for", transfers.CudaTransfers)


def nothing(done: int, total: int) -> None:
    """No one looks."""


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_late_copies_change_nothing(
    direction: Direction, times: int, streams: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Host and device are both the CPU here: without this nothing would stream.
    monkeypatch.setattr(transfers.CudaTransfers, "has", lambda self, tensor: False)
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(FAMILY.tiny_configs["vae"]).eval().requires_grad_(False)
    latents, pixels = torch.randn(2, 4, 6, 5), torch.rand(2, 3, 48, 40)
    given, expected = latents, vae.decode(latents).sample
    if direction == "encode":
        given, expected = pixels, vae.encode(pixels).latent_dist.parameters
    bytes_ = times * least_room(vae, 48, 40, torch.float32, "cpu", direction)
    with Late():
        found = getattr(StripDecode(bytes_, InRam()), direction)(vae, given, CPU, nothing)
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize(
    ("direction", "dtype"), [("decode", torch.float16), ("encode", torch.float32)], ids=str
)
def test_copies_ahead_are_counted(
    direction: Direction, dtype: torch.dtype, streams: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass of the true VAE, in strips of 2 and 6 rows; the libraries' workspace aside."""
    monkeypatch.setattr(room, "_workspace", lambda *_: 0)
    monkeypatch.setattr(room, "_matmul_workspace", lambda _: 0)
    costs = room.Costs(dtype.itemsize, "cuda")
    with torch.no_grad(), fake_device() as device:
        with device:
            vae = build(AutoencoderKL, FAMILY.published_configs["vae"], dtype)
        passes = decoder_passes(vae, 8, 8) if direction == "decode" else encoder_passes(vae, 64, 64)
        for one, rows in product(passes, (2, 6)):
            with LiveBytes(device.type) as live, CudaTransfers(device) as copies:
                for parameter in vae.parameters():
                    live.add(parameter)
                live.peak = weights = live.now
                if isinstance(one, ConvPass):
                    foretold = room.conv_bytes(one, rows, costs)
                    _convolve(one, rows, dtype, copies)
                else:
                    cut = Chunks(rows, 16, resident=rows == 2)
                    foretold = room.attention_bytes(one, cut, costs)
                    _attend(one, cut, dtype, copies)
            assert live.peak - weights <= foretold, (one, rows)


def _convolve(one: ConvPass, rows: int, dtype: torch.dtype, copies: CudaTransfers) -> None:
    source, target = (
        torch.empty(shape.height, shape.channels, shape.width, dtype=dtype)
        for shape in (one.source, one.target)
    )
    channels = one.shortcut.in_channels if one.shortcut is not None else one.target.channels
    kept = torch.empty(one.target.height, channels, one.target.width, dtype=dtype)
    affine = None
    if one.norm is not None:
        affine = torch.empty(2, one.source.channels, 1, 1, device=copies.device)
    convolve(one, source, kept if one.adds else None, target, affine, rows, copies, _no_work)


def _attend(one: AttentionPass, cut: Chunks, dtype: torch.dtype, copies: CudaTransfers) -> None:
    source = torch.empty(one.source.height, one.source.channels, one.source.width, dtype=dtype)
    affine = torch.empty(2, one.source.channels, 1, 1, device=copies.device)
    attend(one, source, affine, cut, Store(), copies, _no_work)


def _no_work(work: int) -> None:
    """No one looks."""


def test_a_rehearsal_holds_what_is_held(streams: None) -> None:
    """Of a picture that is one strip of each pass: the same memory in the same order."""
    config = FAMILY.published_configs["vae"]
    vae = without_storage(lambda: build(AutoencoderKL, config, torch.float16))

    def really(network: AutoencoderKL, device: torch.device) -> None:
        with CudaTransfers(device) as copies:
            for one in decoder_passes(network, 8, 8):
                if isinstance(one, ConvPass):
                    rows = room.conv_rows(one, 1 << 30, room.Costs(2, "cuda"))
                    _convolve(one, rows, torch.float16, copies)

    def rehearsed(network: AutoencoderKL, device: torch.device) -> None:
        rehearse(network, (8, 8), 1 << 30, "decode", device)

    found = [trace(vae, work, library="cudnn") for work in (really, rehearsed)]
    assert found[0].activations == found[1].activations
    assert {size for _, size in found[0].events} == {size for _, size in found[1].events}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_strips_fit_what_the_allocator_reserves(dtype: torch.dtype, true_sizes: Path) -> None:
    budget = Room(320 << 20, "--stage-budget", libraries=32 << 20)
    shape, device = (1, 4, 64, 64), torch.device("cuda")
    option = next(pixels_options(resolve(str(true_sizes)), "strips", dtype, device, budget, shape))
    assert budget.holds(option.need)
    assert option.need.reserved is not None
    assert option.need.allocated < option.need.reserved
