"""Fixtures that several test files use."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowvram.families.family import Family
from lowvram.families.pixart import FAMILY
from lowvram.families.sdxl_refiner import FAMILY as REFINER
from scripts.make_checkpoint import make_checkpoint


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test sees what its user has prepared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWVRAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("LOWVRAM_EMBEDS_CACHE", "off")  # or a stage that is measured loads nothing
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny PixArt-Sigma with random weights, in diffusers layout; do not write into it."""
    folder = tmp_path_factory.mktemp("tiny")
    make_checkpoint(folder, size="tiny", shard="200KB")  # sharded as the published T5 is
    return folder


@pytest.fixture(scope="session")
def tiny_alpha(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of PixArt-alpha."""
    folder = tmp_path_factory.mktemp("tiny-alpha")
    make_checkpoint(folder, size="tiny", shard="200KB", family="pixart-alpha")
    return folder


@pytest.fixture(scope="session")
def tiny_refiner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL refiner with random weights, in diffusers layout; do not write into it."""
    folder = tmp_path_factory.mktemp("refiner")
    make_checkpoint(folder, size="tiny", family="sdxl-refiner")
    return folder


@pytest.fixture(scope="session")
def true_refiner(tiny_refiner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its published configurations; the weights are there by name only."""
    return published(tiny_refiner, REFINER, tmp_path_factory.mktemp("true") / "refiner")


@pytest.fixture(scope="session")
def true_sizes(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published configurations; the weights are there by name only, for nothing loads them."""
    return published(tiny, FAMILY, tmp_path_factory.mktemp("true") / "published")


def published(tiny: Path, family: Family, folder: Path) -> Path:
    """A copy of a tiny checkpoint with the published configurations."""
    shutil.copytree(tiny, folder)
    for role in ("text_encoder", "transformer", "vae"):
        path = folder / family.component(role).subfolder / "config.json"
        config = json.loads(path.read_text()) | dict(family.published_configs[role])
        path.write_text(json.dumps(config))
    return folder
