"""Weights that stream: the same bits as resident ones, in less memory, and nothing left behind."""

import gc
import json
import threading
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowvram
from lowvram import errors
from lowvram.families import all_families
from lowvram.families.family import Family, Size
from lowvram.memory.count import LiveBytes
from lowvram.weights import shards as shards_module
from lowvram.weights.checkpoint import Loaded, Weights, build, find_class, stored_dtype
from lowvram.weights.lanes import ConvertingLane, CopyingLane, MappedLane
from lowvram.weights.layout import fit
from lowvram.weights.quantized import Quantized
from lowvram.weights.shards import Shards
from lowvram.weights.streamed import Streamed, Streaming
from lowvram.weights.whole import Whole
from scripts.make_checkpoint import make_checkpoint

CPU = torch.device("cpu")
FAMILIES = list(all_families().values())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WAYS = {
    "block": {},
    "three blocks": {"window": 3},
    "one stays": {"resident": 1},
    "matrix": {"unit": "matrix"},
    "matrix, two texts at once": {"unit": "matrix", "group": 2, "window": 4},
    "parked": {"parks": True},
}


DEPTHS = ("num_layers", "num_hidden_layers")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of every family, deep enough that a window of two blocks is little of it."""
    folder = tmp_path_factory.mktemp("deep")
    for family in FAMILIES:
        layers = {
            role: config | {name: 8 for name in DEPTHS if name in config}
            for role, config in family.tiny_configs.items()
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(family), "tiny_configs", layers)
            make_checkpoint(folder / family.name, family=family.name, shard="200KB")
    return folder


@cache
def encoded(family: Family, length: int) -> dict[str, torch.Tensor]:
    """What a text of so many tokens becomes, for its shapes."""
    network = find_class(family.component("text_encoder").class_name)
    encoder = build(network, family.tiny_configs["text_encoder"], torch.float32)
    ids = torch.full((1, length), 5)
    made = family.encode(encoder, ids, torch.ones_like(ids))
    return {name: each[0].detach() for name, each in made.items()}


def calls(family: Family, role: str, loaded: Loaded, dtype: torch.dtype) -> list[Callable]:
    """Three calls of a component, with inputs that depend on nothing but their number."""
    made = []
    for number, length in enumerate((7, 1, 20)):
        generator = torch.Generator().manual_seed(number)
        if role == "text_encoder":
            ids = torch.randint(3, 300, (1, length), generator=generator)
            made.append(
                lambda ids=ids: torch.cat(
                    [
                        each.cpu().flatten()
                        for each in family.encode(loaded.model, ids, torch.ones_like(ids)).values()
                        if each.is_floating_point()
                    ]
                )
            )
            continue
        configs = {each: family.tiny_configs[each] for each in ("transformer", "vae")}
        shape = family.latent_shape(configs, family.render_size(configs, None, True)[1])
        latents = torch.randn((1, *shape), generator=generator).to(dtype)
        text = {
            name: torch.randn(each.shape, generator=generator).to(dtype)
            if each.is_floating_point()
            else each
            for name, each in encoded(family, length).items()
        }
        beside, _ = family.picture_conditions(Size(128, 128), family.aesthetic_scores)
        conditions = family.conditions([text | beside], [])
        conditions = {name: each.to(dtype) if name == "time_ids" else each
                      for name, each in conditions.items()}  # fmt: skip
        made.append(
            lambda latents=latents, conditions=conditions: family.predict(
                loaded.model, latents, torch.tensor(500), conditions, 1.0
            )
        )
    return made


def outputs(
    weights: Weights, family: Family, role: str, folder: Path
) -> tuple[list[torch.Tensor], int]:
    """What three calls give, and the bytes that the weights hold."""
    component = family.component(role)
    with torch.inference_mode():
        place = folder / family.name / component.subfolder
        loaded = weights.load(find_class(component.class_name), place, CPU)
        try:
            made = loaded.each(calls(family, role, loaded, weights.dtype), lambda done, total: None)
            return [each.clone() for each in made], loaded.weights_bytes
        finally:
            loaded.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("role", ["text_encoder", "transformer"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_streamed_is_whole_bit_for_bit(
    family: Family, role: str, dtype: torch.dtype, deep: Path
) -> None:
    expected, whole = outputs(Whole(dtype), family, role, deep)
    assert len({tuple(each.flatten()[:5].tolist()) for each in expected}) == 3
    for name, options in WAYS.items():
        component = family.component(role)
        how = Streamed(dtype, component.blocks, component.order, **options)
        found, held = outputs(how, family, role, deep)
        assert all(map(torch.equal, found, expected)), name
        assert held < whole, name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_memory_order_and_closeness(family: Family, deep: Path) -> None:
    dtype, role = torch.bfloat16, "text_encoder"
    held, found = {}, {}
    ways = (Streamed(dtype, family.component(role).blocks), Quantized(4, dtype))
    for weights in (*ways, Quantized(8, dtype), Whole(dtype)):
        found[weights.name], held[weights.name] = outputs(weights, family, role, deep)
    assert held["stream"] < held["4bit"] < held["8bit"] < held["whole"]
    for name, least in (("8bit", 0.98), ("4bit", 0.8)):
        for made, expected in zip(found[name], found["whole"], strict=True):
            assert torch.cosine_similarity(made.flatten(), expected.flatten(), dim=0) > least


def streaming(deep: Path, how: Streamed) -> Streaming:
    return how.load(
        find_class("transformers.T5EncoderModel"), deep / "pixart-sigma/text_encoder", CPU
    )


def test_passes_that_repeat_and_single_calls(deep: Path) -> None:
    family = FAMILIES[0]
    folder = deep / family.name / "transformer"
    for options in ({}, {"resident": 3}, {"unit": "matrix"}):
        how = Streamed(torch.float32, "transformer_blocks", repeats=True, **options)
        with torch.inference_mode():
            loaded = how.load(find_class("diffusers.PixArtTransformer2DModel"), folder, CPU)
            several = calls(family, "transformer", loaded, torch.float32)
            alone = [call() for call in several]
            for _ in range(3):
                assert all(map(torch.equal, loaded.each(several, lambda *_: None), alone))
            assert torch.equal(several[1](), alone[1])
            loaded.close()


def test_lanes(deep: Path) -> None:
    how = Streamed(torch.float32, "encoder.block")
    assert isinstance(streaming(deep, how)._lane, MappedLane)
    assert isinstance(
        streaming(deep, Streamed(torch.bfloat16, "encoder.block"))._lane, ConvertingLane
    )


@pytest.mark.parametrize("keep", [False, True])
def test_the_copying_lane_brings_the_same_bytes(keep: bool, deep: Path) -> None:
    """The lane of a GPU, with RAM in the GPU's place."""
    loaded = streaming(deep, Streamed(torch.bfloat16, "encoder.block"))
    shards, units = loaded._shards, loaded._units
    lane = CopyingLane(shards, units, 2, CPU, keep)
    for _ in range(2):
        for index, unit in enumerate(units):
            sent = lane.send(lane.read(index, unit), unit, index % 2)
            for name, tensor in lane.landed(sent, unit, index % 2).items():
                assert torch.equal(tensor, shards.read(name, torch.bfloat16))
            lane.done(unit, index % 2)
    lane.close()
    loaded.close()


def test_only_a_window_of_weights_is_ever_there(deep: Path) -> None:
    how = Streamed(torch.bfloat16, "encoder.block")
    loaded = streaming(deep, how)
    alive = []

    def look(module: torch.nn.Module, inputs: object) -> None:
        blocks = loaded.model.get_submodule("encoder.block")
        alive.append(sum(not next(block.parameters()).is_meta for block in blocks))

    for block in loaded.model.get_submodule("encoder.block"):
        block.register_forward_pre_hook(look)
    with torch.inference_mode():
        loaded.each(calls(FAMILIES[0], "text_encoder", loaded, how.dtype), lambda *_: None)
    loaded.close()
    assert alive == [1] * len(alive) and len(alive) == 3 * 8


def test_embedding_rows(tmp_path: Path) -> None:
    table = torch.randn(50, 6)
    save_file({"shared.weight": table}, tmp_path / "model.safetensors")
    rows = Shards(tmp_path).rows("shared.weight", [3, 49, 0, 3], torch.float32)
    assert torch.equal(rows, table[[3, 49, 0, 3]])


def test_fit_grows_from_matrices_to_whole() -> None:
    family = FAMILIES[0]
    component = family.component("transformer")
    with torch.device("meta"):
        model_class = find_class(component.class_name)
        model = build(model_class, family.published_configs["transformer"], torch.float16)
    how = Streamed(torch.float16, component.blocks, repeats=True)
    smallest, least = fit(model, how, 50 << 20)
    assert smallest.unit == "matrix" and smallest.window == 2 and sum(least) > 50 << 20
    held = []
    for room in (80_000_000, 140_000_000, 300_000_000, 1_300_000_000):
        found, size = fit(model, how, room)
        assert sum(size) <= room and size == found.sizes(model)
        held.append((found.unit, found.resident))
    assert held[0] == ("matrix", 0) and held[1] == ("block", 0)
    assert 0 < held[2][1] < held[3][1] == 26  # of 28 blocks, beside a window of two


def test_kept_in_float32_as_the_libraries_do(tmp_path: Path, tiny: Path) -> None:
    t5 = find_class("transformers.T5EncoderModel")
    half = torch.float16
    whole = Whole(half).load(t5, tiny / "text_encoder", CPU).model
    for name, parameter in whole.named_parameters():
        assert stored_dtype(t5, name, half) == parameter.dtype
    assert stored_dtype(t5, "encoder.block.0.layer.1.DenseReluDense.wo.weight", half).itemsize == 4


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if "lowvram" in thread.name}


@pytest.mark.parametrize("when", ["reading", "in the middle", "short file"])
def test_errors_leave_nothing(
    when: str, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers: list[weakref.ref[torch.Tensor]] = []
    init = ConvertingLane.__init__

    def watched(self: ConvertingLane, *args: object) -> None:
        init(self, *args)
        buffers.extend(weakref.ref(buffer) for buffer in self._buffers)

    monkeypatch.setattr(ConvertingLane, "__init__", watched)
    on_progress = lowvram.progress.ignore
    if when == "reading":
        warm, count = Shards.warm, [0]

        def failing(self: Shards, name: str) -> None:
            count[0] += 1
            if count[0] > 30:
                raise OSError(5, "Input/output error", "model.safetensors")
            warm(self, name)

        monkeypatch.setattr(Shards, "warm", failing)
        expected: type[BaseException] = errors.ModelError
    elif when == "short file":
        monkeypatch.setattr(
            shards_module, "_fill", lambda *_: (_ for _ in ()).throw(errors.ModelError("truncated"))
        )
        expected = errors.ModelError
    else:
        expected = KeyboardInterrupt

        def on_progress(progress: lowvram.Progress) -> None:
            if progress.done == 3:
                raise KeyboardInterrupt

    with pytest.raises(expected):
        lowvram.encode(
            "a red circle",
            str(deep / "pixart-sigma"),
            output=tmp_path / "x.embeds.safetensors",
            weights="stream",
            on_progress=on_progress,
        )
    gc.collect()
    assert threads() == set()
    assert (buffers or when == "short file") and all(buffer() is None for buffer in buffers)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_shard_is_refused_before_it_is_mapped(deep: Path, tmp_path: Path) -> None:
    source = deep / "pixart-sigma" / "text_encoder"
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = json.loads(next(tmp_path.glob("*.index.json")).read_text())
    victim = tmp_path / sorted(set(index["weight_map"].values()))[-1]
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(errors.ModelError, match=f"{victim.name} is truncated"):
        Streamed(torch.float32, "encoder.block").load(
            find_class("transformers.T5EncoderModel"), tmp_path, CPU
        )


def test_stages_equal_whole_ones(deep: Path, tmp_path: Path) -> None:
    made = {}
    for weights in ("whole", "stream"):
        result = lowvram.run(
            ["a red circle", "two green stars"],
            str(deep / "pixart-sigma"),
            tmp_path / f"{weights}.png",
            encoder_weights=weights,
            transformer_weights=weights,
            steps=3,
            device="cpu",
            in_process=True,
        )
        image = result.images[0]
        made[weights] = {**load_file(image.embeds), **load_file(image.latents)}
        assert [stage["weights"] for stage in result.stages[:2]] == [weights] * 2
    assert made["whole"].keys() == made["stream"].keys()
    assert all(torch.equal(made["whole"][name], made["stream"][name]) for name in made["whole"])


def test_the_count_is_what_the_cpu_holds(deep: Path) -> None:
    """Buffers that weights are converted into are all that a pass takes, beside activations."""
    how = Streamed(torch.bfloat16, "encoder.block")
    with LiveBytes("cpu") as live:
        loaded = streaming(deep, how)
        built = live.now
        assert built <= loaded.weights_bytes * 1.01
        loaded.close()
