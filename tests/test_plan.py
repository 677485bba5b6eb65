"""Plans: foretold without loading anything, kept by the run, and a step down where not."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import lowvram
from lowvram import cli, component, errors
from lowvram.devices import choose_dtype, dtype_name
from lowvram.families import all_families
from lowvram.memory.budget import find_room
from lowvram.memory.plan import Need, Room
from lowvram.memory.predict import trace, without_storage
from lowvram.memory.rates import assumed
from lowvram.pixels.whole import WholeDecode
from lowvram.repository import resolve
from lowvram.request.run import resolve_run
from lowvram.stages import decision
from lowvram.stages import plan as planning
from lowvram.stages.options.component import shapes
from lowvram.stages.options.encoder import encode_once
from lowvram.stages.options.transformer import Steps, step_once, transformer_options
from lowvram.stages.savings import LADDER, UNGUIDED
from lowvram.weights.checkpoint import build, find_class

CUDA = torch.device("cuda")
PROMPT = "a large blue star on a yellow background"


@pytest.mark.parametrize("family", [all_families()["pixart-sigma"]], ids=lambda each: each.name)
def test_two_blocks_tell_of_all(family: Any, true_sizes: Path) -> None:
    """A trace that follows two blocks is the trace of the whole network, in every number."""
    model = resolve(str(true_sizes))
    encoder, blocks = family.component("text_encoder"), family.component("transformer").blocks
    network = shapes(model, "text_encoder", torch.bfloat16)
    work = encode_once(family, 20)
    pairs = [(trace(network, work), trace(network, work, encoder.blocks))]
    transformer = find_class(family.component("transformer").class_name)
    config = family.published_configs["transformer"]
    network = without_storage(lambda: build(transformer, config, torch.float16))
    text = {"prompt_embeds": torch.empty(20, 4096), "prompt_attention_mask": torch.empty(20)}
    for guidance, savings in ((True, LADDER[-1]), (False, UNGUIDED[0])):
        work = step_once(family, savings, Steps((1, 4, 64, 64), text, guidance, 1), "")
        pairs.append((trace(network, work), trace(network, work, blocks)))
    for whole, two in pairs:
        assert (two.activations, two.flops) == (whole.activations, whole.flops)
        shapes_of = [{name: each.shape for name, each in t.result.items()} for t in (whole, two)]
        assert shapes_of[0] == shapes_of[1]
        assert whole.activations > 1e6 and whole.flops > 1e11


def rows(model: Path, every: bool = True, **arguments: Any) -> list[planning.Row]:
    arguments = {"device": "cpu", **arguments}
    tasks = resolve_run([PROMPT], resolve(str(model)), Path("x.png"), **arguments)
    return planning.plan(tasks, CUDA, every)


def test_a_plan_for_a_card_that_is_not_here(true_sizes: Path) -> None:
    found = rows(true_sizes, size=(1024, 1024), vram=4 << 30)
    chosen = {row.stage: row for row in found if row.reason}
    assert list(chosen) == ["encode", "denoise", "decode"]
    assert chosen["encode"].way.startswith("stream, block by block")  # 8 and 4 bits are lossy
    assert chosen["denoise"].way.startswith("whole") and chosen["decode"].way == "whole"
    for row in chosen.values():
        foretold = row.predicted
        assert foretold["peak_allocated_bytes"] <= foretold["peak_reserved_bytes"]
        assert foretold["peak_reserved_bytes"] < foretold["peak_process_bytes"] <= 4 << 30
        assert foretold["seconds"] > 0 and foretold["disk_read_bytes"] > 0
    ways = {row.way.split(",")[0] for row in found if row.stage == "encode"}
    assert ways == {"whole", "8bit", "4bit", "stream"}
    assert not next(row for row in found if row.way == "whole" and row.stage == "encode").fits
    small = rows(true_sizes, every=False, size=(1024, 1024), vram=1 << 30)
    assert [row.way.split(",")[0] for row in small] == ["stream", "stream", "strips"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_here_has_the_dtypes_of_its_components() -> None:
    card = torch.device("cuda")
    for default in (torch.bfloat16, torch.float16):
        assert choose_dtype("auto", dtype_name(default), card)[0] == default


def test_a_plan_needs_configurations_only(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "configurations"
    ignored = shutil.ignore_patterns("*.safetensors", "*.index.json")
    shutil.copytree(tiny, folder, ignore=ignored)
    with_files = rows(tiny, every=False, vram=2 << 30)
    without = rows(folder, every=False, vram=2 << 30)
    assert [row.way for row in without] == [row.way for row in with_files]
    read = [row.predicted["disk_read_bytes"] for row in without]
    assert all(size > 0 for size in read)  # as float32, which is published


def test_lossy_ways_only_where_they_are_named(true_sizes: Path) -> None:
    named = {"encoder_weights": "4bit", "decode": "blended", "vram": 6 << 30}
    found = rows(true_sizes, every=False, **named)
    assert [row.way.split(",")[0] for row in found] == ["4bit", "whole", "blended"]
    with pytest.raises(errors.RequestError, match=r"encode with 4bit needs .* use --vram \d+MiB"):
        rows(true_sizes, every=False, encoder_weights="4bit", vram=3 << 30)


def test_what_does_not_fit_what_is_free(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for more than is free would be no way out."""
    monkeypatch.setattr(decision, "find_room", lambda *_: Room(1 << 10))
    with pytest.raises(errors.RequestError, match=r"needs .* are free: close other programs$"):
        lowvram.encode(PROMPT, str(tiny), output=tiny / "x.embeds.safetensors")


def test_plan_prints(true_sizes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", PROMPT, "-m", str(true_sizes), "--vram", "2GiB", "--size", "4096x4096"]
    assert cli.exit_code([*command, "--no-binning", "--all", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["device"] == "cuda"
    assert {stage["stage"] for stage in document["stages"]} == {"encode", "denoise", "decode"}
    assert cli.exit_code([*command, "--no-binning"]) == 2
    assert "use --vram" in capsys.readouterr().err
    assert cli.exit_code([*command[:-2], "--vram", "2GiB"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("*  ") == 3 and "stream" in shown and "GB" in shown


def test_what_cannot_fit_is_refused_before_any_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode is the stage that cannot: nothing of the two before it may have run."""
    monkeypatch.setattr(component, "use", lambda *_: pytest.fail("loaded"))
    with pytest.raises(errors.RequestError, match=r"decode with whole needs .* --vram"):
        lowvram.run(
            PROMPT, "demo", tmp_path / "x.png", decode="whole", vram=6 << 20, in_process=True
        )
    assert not list(tmp_path.iterdir())


def runs_out(times: int) -> Callable[..., Any]:
    """A decode that runs out of memory so often, then works."""
    left, real = [times], WholeDecode.decode

    def decode(self: WholeDecode, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(self, *arguments)

    return decode


def pixels(path: Path) -> torch.Tensor:
    import numpy

    return torch.from_numpy(numpy.asarray(Image.open(path)).astype("int16"))


def test_out_of_memory_goes_a_step_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lowvram")
    lowvram.run(PROMPT, "demo", tmp_path / "a.png", steps=2, in_process=True)
    monkeypatch.setattr(WholeDecode, "decode", runs_out(1))
    made = lowvram.run(PROMPT, "demo", tmp_path / "b.png", steps=2, in_process=True)
    assert [stage["weights"] for stage in made.stages] == ["whole", "whole", "strips"]
    assert "after whole ran out of memory" in made.stages[2]["reasons"][0]
    assert "trying what takes less" in caplog.text
    assert (pixels(tmp_path / "a.png") - pixels(tmp_path / "b.png")).abs().max() <= 1


def test_a_single_stage_goes_a_step_down_in_a_fresh_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lowvram.run(PROMPT, "demo", tmp_path / "a.png", steps=2, in_process=True)
    monkeypatch.setattr(WholeDecode, "decode", runs_out(99))  # in this process only
    latents = tmp_path / "a.latents.safetensors"
    with pytest.raises(errors.MemoryExhaustedError):
        lowvram.decode(latents, output=tmp_path / "b.png")
    assert cli.exit_code(["decode", str(latents), "-o", str(tmp_path / "b.png")]) == 0
    said = capsys.readouterr()
    assert "trying what takes less" in said.err and "strips" in said.out
    assert (pixels(tmp_path / "a.png") - pixels(tmp_path / "b.png")).abs().max() <= 1


def test_at_the_bottom_it_says_what_to_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(WholeDecode, "decode", runs_out(99))
    command = ["run", PROMPT, "-m", "demo", "-o", str(tmp_path / "x.png"), "--in-process"]
    assert cli.exit_code([*command, "--steps", "1", "--decode", "whole"]) == 6
    told = capsys.readouterr().err.splitlines()[-1]
    assert "decode ran out of memory" in told and "--decode strips" in told
    assert "kept:" in told and (tmp_path / "x.latents.safetensors").is_file()


@contextmanager
def limited_to(part: float) -> Iterator[None]:
    """The tracker of the CPU stops at a part of what it is allowed."""
    real = component.tracked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            component,
            "tracked",
            lambda device, room, size: real(
                device, replace(room, bytes=int(part * room.bytes)), size
            ),
        )
        yield


@pytest.mark.parametrize("decode", ["whole", "strips"])
@pytest.mark.parametrize("weights", ["whole", "stream"])
def test_the_foretold_peak_is_enough_and_less_is_not(
    weights: str, decode: str, tmp_path: Path
) -> None:
    """Each stage in 1 % more than its foretold peak; in 90 % it stops with the code."""
    free = lowvram.run(
        PROMPT,
        "demo",
        tmp_path / "a.png",
        steps=2,
        encoder_weights=weights,
        transformer_weights=weights,
        decode=decode,
        stage_budget=1 << 30,
        in_process=True,
    )
    embeds, latents = tmp_path / "a.embeds.safetensors", tmp_path / "a.latents.safetensors"
    stages: list[Callable[[int], Any]] = [
        lambda size: lowvram.encode(
            PROMPT, "demo", output=embeds, weights=weights, stage_budget=size
        ),
        lambda size: lowvram.denoise(
            embeds, output=latents, steps=2, weights=weights, stage_budget=size
        ),
        lambda size: lowvram.decode(
            latents, output=tmp_path / "b.png", decode=decode, stage_budget=size
        ),
    ]
    for report, stage in zip(free.stages, stages, strict=True):
        room = int(1.01 * report["predicted"]["peak_allocated_bytes"])
        if room < 1 << 20:
            continue  # the smallest budget there is
        again = stage(room).report
        assert again.peak_allocated_bytes <= room
        # of oneDNN's copies the tracker knows nothing
        assert again.peak_allocated_bytes >= (0.5 if again.stage == "decode" else 0.9) * room
        with (
            limited_to(0.9 * again.peak_allocated_bytes / room),
            pytest.raises(errors.MemoryExhaustedError, match="ran out of memory"),
        ):
            stage(room)
    assert pixels(tmp_path / "a.png").equal(pixels(tmp_path / "b.png"))


@pytest.mark.parametrize(
    ("name", "vram", "found"),
    [
        ("auto", 1 << 30, "cuda"),
        ("auto", 0, "cpu"),
        ("cpu", 1 << 30, "cpu"),
        ("cuda:1", 0, "cuda:1"),
    ],
)
def test_what_is_planned_for(name: str, vram: int, found: str) -> None:
    assert str(planning.device_to_plan_for(name, vram)) == found


def test_no_such_device_to_plan_for() -> None:
    with pytest.raises(errors.DeviceError, match="no device 'cudafoo' here"):
        planning.device_to_plan_for("cudafoo", 0)


def test_measured_rates_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Context and cuBLAS as doctor has measured them, else as assumed."""
    guess = assumed("cuda")
    room = find_room(CUDA, 4 << 30, 0, guess)
    assert (room.bytes, room.libraries) == ((4 << 30) - guess.context_bytes, guess.cublas_bytes)
    for vram, stage_budget in ((4 << 30, 0), (0, 1 << 30)):  # of the process in either case
        room = find_room(CUDA, vram, stage_budget, guess)
        foretold = Need(1000, 2000).foretold(room, guess, "float16", 0)
        assert foretold["peak_process_bytes"] == 2000 + guess.context_bytes
    room = find_room(CUDA, 4 << 30, 0, replace(guess, context_bytes=1 << 28, cublas_bytes=0))
    assert (room.bytes, room.libraries) == ((4 << 30) - (1 << 28), 0)


def test_a_stream_without_a_budget_keeps_to_two_blocks(true_sizes: Path) -> None:
    text = {"prompt_embeds": torch.empty(20, 4096), "prompt_attention_mask": torch.empty(20)}
    steps = Steps((1, 4, 64, 64), text, True, 1)

    def first(asked: str, room: Room) -> str:
        cpu, model = torch.device("cpu"), resolve(str(true_sizes))
        return str(next(transformer_options(model, asked, torch.float16, cpu, room, steps)))

    free = Room(8 << 30)  # what happens to be free is no wish
    assert first("stream", free).startswith("stream, block by block; ")
    assert "26 blocks stay" in first("stream", replace(free, option="--vram"))
