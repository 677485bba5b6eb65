"""Models are found by short name, folder and repository; what is missing is said in one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

import lowvram
from lowvram import errors, files
from lowvram.families.pixart import FAMILY
from lowvram.repository import Model, resolve

COMMIT = "a" * 40
BASE = FAMILY.models["pixart-sigma-1024"]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    files.commit.cache_clear()
    return tmp_path / "hub"


def put_in_cache(cache: Path, repository: str, commit: str, content: Path) -> Path:
    """Lay a folder into the cache as the Hub's client does."""
    entry = cache / f"models--{repository.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(commit)
    shutil.copytree(content, entry / "snapshots" / commit)
    # What the client notes of files that it asked for and the repository does not have.
    absent = entry / ".no_exist" / commit
    for name in ("model_index.json", "transformer/config.json", "config.json"):
        if not (content / name).exists():
            (absent / name).parent.mkdir(parents=True, exist_ok=True)
            (absent / name).touch()
    return entry / "snapshots" / commit


def test_folder(tiny: Path) -> None:
    model = resolve(str(tiny))
    assert (model.family, model.steps, model.guidance_scale) == ("pixart-sigma", 20, 4.5)
    assert model.fetch("vae") == tiny / "vae"
    assert Model.from_record(json.loads(json.dumps(model.record()))) == model


def test_repository_in_the_cache(offline: Path, tiny: Path) -> None:
    snapshot = put_in_cache(offline, "someone/finetune", COMMIT, tiny)
    model = resolve("someone/finetune")
    assert {source.revision for source in model.sources.values()} == {COMMIT}
    for role in ("text_encoder", "tokenizer", "transformer", "scheduler", "vae"):
        assert model.fetch(role) == snapshot / role


def test_what_is_to_be_downloaded_is_the_very_commit(offline: Path) -> None:
    source = files.Source("someone/finetune", COMMIT, "hub")
    command = f"run hf download someone/finetune --revision {COMMIT} where"
    with pytest.raises(errors.ModelError, match=command):
        files.find(source, "config.json")
    with pytest.raises(errors.ModelError, match="run hf download someone/finetune where"):
        files.find(replace(source, revision="main"), "config.json")


@pytest.mark.parametrize("layout", ["transformer", "."])
def test_a_lone_transformer_takes_the_rest_from_the_base(
    layout: str, offline: Path, tiny: Path, tmp_path: Path
) -> None:
    base = put_in_cache(offline, BASE.repository, BASE.revision, tiny)
    lone = tmp_path / "lone"
    shutil.copytree(tiny / "transformer", lone / layout)
    snapshot = put_in_cache(offline, "someone/transformer", COMMIT, lone)
    for name in ("someone/transformer", str(lone)):
        model = resolve(name)
        there = snapshot if name.startswith("someone") else lone
        assert model.fetch("transformer") == (there if layout == "." else there / layout)
        assert model.fetch("text_encoder") == base / "text_encoder"
        assert model.config("transformer")["sample_size"] == 32


def test_short_names_complete_each_other(offline: Path, tiny: Path) -> None:
    put_in_cache(offline, BASE.repository, BASE.revision, tiny)
    model = resolve("pixart-sigma-512")
    assert model.sources["transformer"].place.endswith("512-MS")
    assert model.sources["vae"].place == BASE.repository
    with pytest.raises(errors.ModelError, match=r"512-MS is not in the cache.*hf download"):
        model.fetch("transformer")


def test_offline_and_not_cached_says_how_to_get_it(offline: Path) -> None:
    for name in ("pixart-sigma-2k", "someone/unknown"):
        with pytest.raises(errors.ModelError, match=r"HF_HUB_OFFLINE is set.*hf download"):
            resolve(name)
    with pytest.raises(errors.ModelError, match=r"HF_HUB_OFFLINE is set.*hf download"):
        resolve("pixart-sigma-1024").config("vae")


def test_half_a_download_is_refused(offline: Path, tiny: Path) -> None:
    snapshot = put_in_cache(offline, "someone/half", COMMIT, tiny)
    shards = sorted((snapshot / "text_encoder").glob("*.safetensors"))
    assert len(shards) > 1
    shards[0].unlink()
    with pytest.raises(errors.ModelError, match=shards[0].name):
        resolve("someone/half").fetch("text_encoder")


@pytest.mark.parametrize("content", [None, b"nonsense"])
def test_a_tokenizer_without_its_pieces_is_refused(
    content: bytes | None, tiny: Path, tmp_path: Path
) -> None:
    """transformers makes up a vocabulary where the file is missing: the prompt would be lost."""
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    pieces = folder / "tokenizer" / "spiece.model"
    pieces.unlink() if content is None else pieces.write_bytes(content)
    with pytest.raises(errors.ModelError, match=r"spiece\.model|cannot be loaded"):
        lowvram.encode("a cat", str(folder), output=tmp_path / "x.embeds.safetensors")


def test_other_pipelines_and_odd_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ModelError, match="neither model_index"):
        resolve(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(errors.ModelError, match=r"FluxPipeline.*families are pixart-sigma"):
        resolve(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(errors.ModelError, match="not readable JSON"):
        resolve(str(tmp_path))


def test_a_folder_that_changed_is_noticed(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    embeds = lowvram.encode("a cat", str(folder), output=tmp_path / "x.embeds.safetensors")
    weights = next((folder / "transformer").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(errors.ModelError, match="has changed since"):
        lowvram.denoise(embeds.paths[0], output=tmp_path / "x.latents.safetensors", steps=1)
    lowvram.denoise(
        embeds.paths[0],
        output=tmp_path / "x.latents.safetensors",
        steps=1,
        model=str(folder),
    )


def test_damaged_weights_are_named(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    next((folder / "vae").glob("*.safetensors")).write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(errors.ModelError, match=r"vae cannot be loaded .*prepare it again"):
        lowvram.run("a cat", str(folder), tmp_path / "x.png", steps=1, in_process=True)
    assert (tmp_path / "x.latents.safetensors").exists()
