"""Checkpoints with random weights: true sizes, the real classes' layout, the same numbers always.

Run: scripts/test tests/test_make_checkpoint.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import T5EncoderModel, T5Tokenizer

from lowvram.errors import RequestError
from lowvram.families import all_families
from scripts.make_checkpoint import SETTINGS, build, main, make_checkpoint

FAMILY = all_families()["pixart-sigma"]
CLASSES = {
    "text_encoder": T5EncoderModel,
    "transformer": PixArtTransformer2DModel,
    "vae": AutoencoderKL,
}


def published(role: str) -> Any:
    model = build(FAMILY.component(role), FAMILY.published_configs[role])
    assert isinstance(model, CLASSES[role])
    return model


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def load(folder: Path, role: str) -> Any:
    """The component as users load it; fails unless the file and the class have the same tensors."""
    model, found = CLASSES[role].from_pretrained(folder / role, output_loading_info=True)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not found[key], (role, key, found[key])
    return model


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a component's files, whatever the sharding."""
    read: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            read |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return read


def test_published_sizes_are_the_true_ones() -> None:
    assert count(published("text_encoder")) == 4_762_310_656
    assert count(published("transformer")) == 610_856_096
    assert count(published("vae").decoder) == 49_490_179


@pytest.mark.parametrize("role", CLASSES)
def test_the_real_class_loads_it_without_a_difference(tiny: Path, role: str) -> None:
    model = load(tiny, role)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_tied_embedding_is_in_the_file_once(tiny: Path) -> None:
    index = json.loads((tiny / "text_encoder" / "model.safetensors.index.json").read_text())
    assert "shared.weight" in index["weight_map"]
    assert "encoder.embed_tokens.weight" not in index["weight_map"]
    model = load(tiny, "text_encoder")
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert index["metadata"]["total_size"] == 4 * count(model)


def test_shards_are_those_of_save_pretrained(tiny: Path, tmp_path: Path) -> None:
    load(tiny, "text_encoder").save_pretrained(tmp_path, max_shard_size="200KB")
    names = {path.name for path in tmp_path.iterdir()}
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert {path.name for path in (tiny / "text_encoder").iterdir()} == names


def test_sharding_does_not_change_tensors(tiny: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, components=["text_encoder"], shard="5GB")
    assert [p.name for p in (tmp_path / "text_encoder").glob("*.safetensors")] == [
        "model.safetensors"
    ]
    sharded, single = tensors(tiny / "text_encoder"), tensors(tmp_path / "text_encoder")
    assert sharded.keys() == single.keys()
    assert all(torch.equal(sharded[name], single[name]) for name in single)


def test_seed_changes_every_tensor(tiny: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, components=["vae"], seed=1)
    first, second = tensors(tiny / "vae"), tensors(tmp_path / "vae")
    assert not any(torch.equal(first[name], second[name]) for name in second)


def test_tensors_of_one_shape_differ(tiny: Path) -> None:
    read = list(tensors(tiny / "transformer").values())
    for number, one in enumerate(read):
        assert not any(torch.equal(one, other) for other in read[number + 1 :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_activations_are_finite_and_of_ordinary_size(tiny: Path, dtype: torch.dtype) -> None:
    """Text states, predicted noise and pixels; float16 has no margin below a thousandth of this."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 32, 32, generator=generator).to(dtype)
    ids = torch.randint(3, 200, (2, 12), generator=generator)
    text = load(tiny, "text_encoder").to(dtype)(ids)[0]
    noise = load(tiny, "transformer").to(dtype)(
        latents,
        encoder_hidden_states=text,
        timestep=torch.tensor([900, 900]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    pixels = load(tiny, "vae").to(dtype).decode(latents, return_dict=False)[0]
    for output in (text, noise, pixels):
        assert 0.1 < output.float().std() < 10
    assert not torch.equal(noise[0], noise[1])


def test_tokenizer_is_like_t5(tiny: Path) -> None:
    assert [path.name for path in (tiny / "tokenizer").iterdir()] == ["spiece.model"]
    tokenizer = T5Tokenizer.from_pretrained(tiny / "tokenizer")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    ascii_characters = "".join(map(chr, range(33, 127)))
    for text in ("a large blue star on a yellow background", " ".join(ascii_characters)):
        ids = tokenizer(text).input_ids
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]


def test_no_token_is_beyond_the_embedding(tiny: Path) -> None:
    tokenizer = T5Tokenizer.from_pretrained(tiny / "tokenizer")
    rows = load(tiny, "text_encoder").shared.num_embeddings
    assert len(tokenizer) <= rows
    assert max(tokenizer("<extra_id_0> <extra_id_99> \N{CAT}").input_ids) < rows


def test_dtype_and_size_reach_the_files(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, components=["transformer"], dtype="bfloat16", sample_size=128)
    assert {t.dtype for t in tensors(tmp_path / "transformer").values()} == {torch.bfloat16}
    config = load(tmp_path, "transformer").config
    assert (config.sample_size, config.interpolation_scale) == (128, 2)


def test_a_lone_transformer_has_no_index(tiny: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, components=["transformer"])
    assert {path.name for path in tmp_path.iterdir()} == {SETTINGS, "transformer"}
    index = json.loads((tiny / "model_index.json").read_text())
    listed = {role for role in index if not role.startswith("_")}
    assert listed == {"tokenizer", "text_encoder", "transformer", "scheduler", "vae"}
    assert all((tiny / role).is_dir() for role in listed)


def test_what_it_did_not_make_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "holiday.jpg").write_text("mine")
    with pytest.raises(RequestError, match="holds something else"):
        make_checkpoint(tmp_path, components=["vae"])
    assert main([str(tmp_path), "--components", "vae"]) == RequestError.exit_code
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
    assert len(caplog.messages) == 1


def test_made_before_is_kept_and_begun_before_is_finished(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, components=["vae"])
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"")
    make_checkpoint(tmp_path, components=["vae"])
    assert weights.read_bytes() == b"", "a finished folder was written again"
    with pytest.raises(RequestError, match="holds something else"):
        make_checkpoint(tmp_path, components=["vae"], seed=1)
    (tmp_path / SETTINGS).write_text("")
    make_checkpoint(tmp_path, components=["vae"])
    assert weights.read_bytes() == whole


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": "huge"},
        {"components": ["unet"]},
        {"components": []},
        {"dtype": "int8"},
        {"shard": "five"},
        {"sample_size": 0},
        {"family": "nobody"},
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, wrong: dict[str, Any]
) -> None:
    with pytest.raises(RequestError):
        make_checkpoint(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()
