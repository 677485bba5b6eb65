"""Artifacts: what is written is read back, and nothing damaged or foreign passes for one."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lowvram import artifacts, errors
from lowvram.artifacts import Header

TENSORS = {
    "0.prompt_embeds": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "0.prompt_attention_mask": torch.ones(3, dtype=torch.int64),
    "scalar": torch.tensor(2.5),
}


def header() -> Header:
    return Header("embeds", {"name": "demo"}, {"steps": 3}, [{"prompt": "a “cat”\n"}], "made")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "x.embeds.safetensors"
    artifacts.write(path, header(), TENSORS)
    return path


def test_round_trip_and_key(written: Path, tmp_path: Path) -> None:
    found, tensors = artifacts.read(written, "embeds")
    assert (found.model, found.settings, found.items) == (
        {"name": "demo"},
        {"steps": 3},
        found.items,
    )
    assert found.items == header().items
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert artifacts.read_header(written) == found

    again = tmp_path / "again.embeds.safetensors"
    assert artifacts.write(again, header(), TENSORS).key == found.key
    assert again.read_bytes() == written.read_bytes()
    other = artifacts.write(again, header(), {**TENSORS, "scalar": torch.tensor(2.0)})
    assert other.key != found.key


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_passes(position: float, bit: int, written: Path, tmp_path: Path) -> None:
    data = bytearray(written.read_bytes())
    data[int(position * len(data))] ^= 1 << bit
    damaged = tmp_path / "damaged.embeds.safetensors"
    damaged.write_bytes(data)
    with pytest.raises(errors.ArtifactError, match=r"^[^\n]{1,400}$"):
        artifacts.read(damaged, "embeds")


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=200))
def test_foreign_bytes_are_refused_in_one_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(data)
    with pytest.raises(errors.ArtifactError, match=r"^[^\n]+$"):
        artifacts.read(path, "latents")


def test_truncated_foreign_and_missing_files(written: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.embeds.safetensors"
    cut.write_bytes(written.read_bytes()[:-3])
    with pytest.raises(errors.ArtifactError, match="truncated"):
        artifacts.read(cut, "embeds")
    plain = tmp_path / "plain.safetensors"
    save_file({"a": torch.ones(2)}, plain)
    with pytest.raises(errors.ArtifactError, match="did not write"):
        artifacts.read(plain, "embeds")
    with pytest.raises(errors.ArtifactError, match="holds embeds, but latents are needed"):
        artifacts.read(written, "latents")
    with pytest.raises(errors.ArtifactError, match="does not exist"):
        artifacts.read(tmp_path / "none.safetensors", "latents")
    with pytest.raises(errors.ArtifactError, match="cannot be read"):
        artifacts.read(tmp_path, "latents")


def test_newer_format_says_so(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "newer.safetensors"
    text = json.dumps({"version": artifacts.FORMAT_VERSION + 1, "a later field": 1})
    save_file({"a": torch.ones(2)}, path, {artifacts.METADATA_KEY: text})
    with pytest.raises(errors.ArtifactError, match="update lowvram"):
        artifacts.read(path, "embeds")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_no_space_leaves_what_was_there(
    call: str, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = written.read_bytes()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(errors.StorageError, match="free some space"):
        artifacts.write(written, header(), {"other": torch.zeros(5)})
    assert written.read_bytes() == before
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_one_metadata_key_with_canonical_json(written: Path) -> None:
    data = written.read_bytes()
    listing = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text = listing["__metadata__"].pop(artifacts.METADATA_KEY)
    assert listing["__metadata__"] == {}
    assert artifacts.canonical_json(json.loads(text)) == text


def test_a_name_of_any_length_is_written_by_a_short_one(tmp_path: Path) -> None:
    """255 bytes, of which a longer temporary name would leave nothing."""
    path = tmp_path / f"{'é' * 117}x.embeds.safetensors"[:255]
    assert len(path.name.encode()) in (254, 255)
    artifacts.write(path, header(), TENSORS)
    assert artifacts.verify(path, "embeds") and list(tmp_path.iterdir()) == [path]
