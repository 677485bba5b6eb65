"""One prepared text encoder serves every model that has the same, and no other."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import lowvram
from lowvram import artifacts, contents, errors, files, prepared, prepared_folders, repository
from lowvram.manifest import MANIFEST, read_manifest
from lowvram.repository import Model, resolve
from lowvram.stages.prepare import prepare
from scripts.make_checkpoint import make_checkpoint
from tests.test_contents import on_the_hub

ASKED = ("text_encoder", "whole", "bfloat16")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for each test."""
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def alpha(tiny: Path, tiny_alpha: Path, tmp_path: Path) -> Path:
    """A PixArt-alpha with the text encoder of the PixArt-Sigma, in a repository of its own."""
    folder = tmp_path / "alpha"
    shutil.copytree(tiny_alpha, folder)
    for role in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / role)
        shutil.copytree(tiny / role, folder / role)
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": "alpha"}))
    return folder


def joined(folder: Path) -> None:
    """The text encoder's shards as a single file: the same tensors, other files."""
    place = folder / "text_encoder"
    tensors = {}
    for path in sorted(place.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (place / "model.safetensors.index.json").unlink()
    save_file(tensors, place / "model.safetensors", {"format": "pt"})


def encoders() -> list[str]:
    return [e.name for e in prepared.list_prepared() if "text_encoder" in e.name]


def test_another_familys_model_is_served(tiny: Path, alpha: Path, tmp_path: Path) -> None:
    prepare(resolve(str(tiny)))
    model = resolve(str(alpha))
    folder = prepared.find(resolve(str(tiny)), *ASKED)
    assert folder is not None and prepared.find(model, *ASKED) == folder
    assert prepared.find(model, "tokenizer", "", "") is not None
    assert prepared.find(model, "transformer", "whole", "float16") is None
    made = prepare(model)
    assert len(encoders()) == 1 and len(prepared.list_prepared()) == 4  # two transformers
    assert {each.role for each in made} == {"tokenizer", "text_encoder", "transformer"}
    result = lowvram.encode("a cat", str(alpha), output=tmp_path / "x.embeds.safetensors")
    assert "prepared (text_encoder-bfloat16)" in result.report.reasons


@pytest.mark.parametrize("weights", ["bf16", "8bit"])
def test_files_that_are_cut_otherwise_become_one(
    weights: str, tiny: Path, alpha: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lowvram")
    joined(alpha)
    first, second = resolve(str(tiny)), resolve(str(alpha))
    asked = ASKED if weights == "bf16" else ("text_encoder", "8bit", "bfloat16")
    prepare(first, weights)
    assert prepared.find(second, *asked) is None
    prepare(second, weights)
    assert len(encoders()) == 1
    assert "is the same as that of" in caplog.text
    assert prepared.find(second, *asked) == prepared.find(first, *asked) is not None
    assert [each.state for each in prepared.list_prepared() if "text" in each.name] == ["ready"]


def test_what_another_process_works_on_is_left_alone(tiny: Path, alpha: Path) -> None:
    joined(alpha)
    prepare(resolve(str(tiny)))
    folder = prepared.find(resolve(str(tiny)), *ASKED)
    assert folder is not None
    with prepared_folders.locked(folder):
        prepare(resolve(str(alpha)))
    assert len(encoders()) == 2
    assert prepared.find(resolve(str(alpha)), *ASKED) != folder


@pytest.mark.parametrize("meanwhile", ["served another", "removed"])
def test_what_changes_before_its_turn_is_read_again(
    meanwhile: str, tiny: Path, alpha: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No entry of the manifest is lost, and what is gone does not come back as one file."""
    joined(alpha)
    prepare(resolve(str(tiny)))
    folder = prepared.find(resolve(str(tiny)), *ASKED)
    assert folder is not None
    real = prepared.locked

    @contextmanager
    def late(target: Path, *rest: Any, **options: Any) -> Iterator[None]:
        if target == folder and meanwhile == "removed":
            prepared_folders.delete(folder)
        elif target == folder:
            made = read_manifest(folder)
            assert made is not None
            served = replace(made, contents={**made.contents, "of another": 7})
            (folder / MANIFEST).write_text(served.to_text())
        with real(target, *rest, **options):
            yield

    monkeypatch.setattr(prepared, "locked", late)
    prepare(resolve(str(alpha)))
    there = prepared.find(resolve(str(alpha)), *ASKED)
    assert there is not None and len(encoders()) == 1
    if meanwhile == "removed":
        assert there != folder and not folder.exists()
    else:
        assert there == folder
        made = read_manifest(folder)
        assert made is not None and "of another" in made.contents and len(made.contents) == 3


def test_what_differs_in_the_middle_is_not_served(tiny: Path, alpha: Path) -> None:
    prepare(resolve(str(tiny)))
    path = max((alpha / "text_encoder").glob("*.safetensors"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 2, len(data) // 2 + 4):  # one is lost in bfloat16
        data[at] ^= 0x10
    path.write_bytes(data)
    assert prepared.find(resolve(str(alpha)), *ASKED) is None
    prepare(resolve(str(alpha)))
    assert len(encoders()) == 2


def test_sizes_are_compared_before_anything_is_read(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(resolve(str(tiny)))
    make_checkpoint(tmp_path / "half", dtype="bfloat16")
    monkeypatch.setattr(contents, "file_sha256", lambda path: pytest.fail(f"read {path}"))
    assert prepared.find(resolve(str(tmp_path / "half")), *ASKED) is None


def test_a_folder_that_changed_is_still_noticed(tiny: Path, alpha: Path, tmp_path: Path) -> None:
    embeds = tmp_path / "x.embeds.safetensors"
    (alpha / "text_encoder" / "config.json").write_text("{}")
    broken = resolve(str(alpha))
    shutil.copy(tiny / "text_encoder" / "config.json", alpha / "text_encoder" / "config.json")
    prepare(resolve(str(tiny)))
    assert prepared.find(resolve(str(alpha)), *ASKED) is not None
    assert prepared.find(broken, *ASKED) is None
    with pytest.raises(errors.ModelError, match="has changed since"):
        broken.fetch("text_encoder")
    assert not embeds.exists()


def test_pictures_are_the_same_with_a_shared_encoder(
    alpha: Path, tiny: Path, tmp_path: Path
) -> None:
    made = []
    for name in ("own", "shared"):
        path = tmp_path / f"{name}.embeds.safetensors"
        lowvram.encode("a red circle", str(alpha), output=path)
        made.append(load_file(path))
        prepare(resolve(str(tiny)))
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    headers = [
        artifacts.read_header(tmp_path / f"{n}.embeds.safetensors", "embeds")
        for n in ("own", "shared")
    ]
    assert headers[0].key == headers[1].key
    assert isinstance(Model.from_record(headers[1].model), repository.Model)


def test_what_is_not_downloaded_is_not_needed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub says that its text encoder is the one that was prepared from a folder."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    files.commit.cache_clear()
    large = on_the_hub(tmp_path / "hub", tiny, with_weights=False)
    embeds = tmp_path / "x.embeds.safetensors"
    with pytest.raises(errors.ModelError, match=r"has no model-00001"):
        lowvram.encode("a cat", "pixart-sigma-1024", output=embeds)
    prepare(resolve(str(tiny)))
    monkeypatch.setattr(contents, "sha256_on_hub", lambda source, name: large[name])
    result = lowvram.encode("a cat", "pixart-sigma-1024", output=embeds)
    assert "prepared (text_encoder-bfloat16)" in result.report.reasons
