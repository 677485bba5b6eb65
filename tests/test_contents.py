"""Components are known by their content, wherever it lies."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from lowvram import contents, errors, files
from lowvram.contents import component_key, file_sha256
from lowvram.families.pixart import FAMILY
from lowvram.repository import resolve

BASE = FAMILY.models["pixart-sigma-1024"]
ROLES = [component.role for component in FAMILY.components]


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    return folder


def keys(folder: Path) -> dict[str, str]:
    return {role: component_key(resolve(str(folder)), role) for role in ROLES}


def test_the_same_content_elsewhere_has_the_same_key(tiny: Path, copied: Path) -> None:
    for path in copied.glob("*/config.json"):  # as another version of the library writes it
        config = json.loads(path.read_text()) | {"_name_or_path": "x", "dropout_rate": 0.0}
        path.write_text(json.dumps({**config, "transformers_version": "4.0"}))
    for path in (copied / "text_encoder").glob("model-*"):
        path.rename(path.with_name(f"renamed-{path.name}"))
    index = next((copied / "text_encoder").glob("*.index.json"))
    index.write_text(index.read_text().replace('"model-0', '"renamed-model-0'))
    assert keys(copied) == keys(tiny)
    assert len(set(keys(tiny).values())) == len(ROLES)


@pytest.mark.parametrize("role", ROLES)
def test_other_content_has_another_key(role: str, tiny: Path, copied: Path) -> None:
    folder = copied / role
    if role == "scheduler":
        path = folder / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.03}))
    else:  # in the middle, where the quick fingerprint of a folder does not look
        path = max(folder.iterdir(), key=lambda each: each.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert {name for name in ROLES if keys(copied)[name] != keys(tiny)[name]} == {role}


def test_other_configurations_are_other_components(tiny: Path, copied: Path) -> None:
    path = copied / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_epsilon": 1e-5}))
    assert keys(copied)["text_encoder"] != keys(tiny)["text_encoder"]


def test_bytes_are_read_once(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next((copied / "vae").glob("*.safetensors"))
    first = file_sha256(path)
    assert first == hashlib.sha256(path.read_bytes()).hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(contents.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
        assert file_sha256(path) == first
    path.write_bytes(path.read_bytes()[::-1])
    assert file_sha256(path) != first


def on_the_hub(cache: Path, tiny: Path, with_weights: bool) -> dict[str, str]:
    """The tiny model as the Hub's client keeps it; sha256 of each large file by its name."""
    entry = cache / f"models--{BASE.repository.replace('/', '--')}"
    snapshot, large = entry / "snapshots" / BASE.revision, {}
    for path in sorted(p for p in tiny.rglob("*") if p.is_file()):
        name = path.relative_to(tiny)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".safetensors":
            shutil.copy(path, snapshot / name)
            continue
        large[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
        blob = entry / "blobs" / large[str(name)]
        blob.parent.mkdir(exist_ok=True)
        if with_weights:
            blob.write_bytes(b"")  # nothing of it may be read: it is known by its name
            (snapshot / name).symlink_to(blob)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(BASE.revision)
    return large


@pytest.mark.parametrize("with_weights", [True, False])
def test_the_hub_knows_without_reading(
    with_weights: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    files.commit.cache_clear()
    large = on_the_hub(tmp_path, tiny, with_weights)
    model = resolve("pixart-sigma-1024")
    if not with_weights:
        with pytest.raises(errors.ModelError, match="is not in the cache"):
            component_key(model, "text_encoder")
        monkeypatch.setattr(
            huggingface_hub.HfApi,
            "get_paths_info",
            lambda self, repo, paths, revision: [
                SimpleNamespace(lfs=SimpleNamespace(sha256=large[path])) for path in paths
            ],
        )
    assert {role: component_key(model, role) for role in ROLES} == keys(tiny)


@pytest.mark.parametrize(
    ("there", "found"),
    [
        ((), []),
        (("model.fp16.safetensors",), []),  # what a download of a variant leaves in the cache
        (("model.fp16.safetensors", "model.safetensors"), ["model.safetensors"]),
        (("model.safetensors", "model.safetensors.index.json"), ["model.safetensors"]),
        (("model.safetensors.index.json",), ["a", "b"]),
        (
            (
                "diffusion_pytorch_model.safetensors.index.json",
                "diffusion_pytorch_model.safetensors",
            ),
            ["a", "b"],
        ),
        (("diffusion_pytorch_model.safetensors",), ["diffusion_pytorch_model.safetensors"]),
    ],
)
def test_weight_files_are_those_that_the_libraries_load(
    there: tuple[str, ...], found: list[str], tmp_path: Path
) -> None:
    for name in there:
        (tmp_path / name).write_text('{"weight_map": {"x": "b", "y": "a", "z": "b"}}')
    assert files.weight_names(tmp_path) == found
    assert bool(files.missing_weights(tmp_path)) == (found in ([], ["a", "b"]))


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"x": 1}}', "["])
def test_a_damaged_index_is_one_line(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(errors.ModelError, match=r"index\.json"):
        files.weight_names(tmp_path)
