"""The files of models: in the caches, fetched singly from the Hub, or in local folders.

Knows repositories, commits and folders, and nothing of what the files mean.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lowvram.errors import ModelError, RequestError, first_line
from lowvram.unavailable import unavailable

PACKAGE = Path(__file__).parent

# What a component may consist of. Only safetensors: other formats can run code when loaded.
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt")
_UNWANTED = (
    "*.fp16.*",
    "*.fp16-*",
    "*.bf16.*",
    "*.bf16-*",
    "*.non_ema.*",
    "*flax_*",
    "*openvino_*",
)
_SAMPLED_BYTES = 1 << 16
STEMS = {"transformers": "model", "diffusers": "diffusion_pytorch_model"}  # of weight files
_LISTINGS = (
    f"{STEMS['transformers']}.safetensors",
    f"{STEMS['transformers']}.safetensors.index.json",
    f"{STEMS['diffusers']}.safetensors.index.json",
    f"{STEMS['diffusers']}.safetensors",
)


@dataclass(frozen=True)
class Source:
    """A repository at a commit, or a local folder.

    Attributes:
        place: "owner/name" on the Hub, the absolute path of a folder, or for the model inside
            this package its path there.
        revision: the commit; for a folder a fingerprint of the component's files.
        kind: "hub", "folder" or "bundled".
    """

    place: str
    revision: str
    kind: str

    @property
    def folder(self) -> Path:
        """The folder of a local source."""
        return PACKAGE / self.place if self.kind == "bundled" else Path(self.place)


def user_cache() -> Path:
    """This package's own cache: LOWVRAM_CACHE, or a folder where the system keeps caches."""
    from platformdirs import user_cache_dir

    named = os.environ.get("LOWVRAM_CACHE")
    return absolute(named) if named else Path(user_cache_dir("lowvram", False))


def absolute(name: str | Path) -> Path:
    """A folder that a user names, "~" for the home folder.

    Raises:
        RequestError: nobody has that home folder.
    """
    try:
        return Path(name).expanduser().absolute()
    except RuntimeError:
        raise RequestError(f"{name} names no home folder: write the whole path") from None


def hub_cache() -> Path:
    """Where downloads lie."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


@cache
def commit(repository: str, revision: str, name: str = "config.json") -> str:
    """The commit behind a branch or tag: the Hub's answer, or the cache's when offline.

    Args:
        name: of a file that may be there, besides those of whole models and lone components.
    """
    if len(revision) == 40 and set(revision) <= set("0123456789abcdef"):
        return revision
    source = Source(repository, revision, "hub")
    for each in dict.fromkeys(("model_index.json", "transformer/config.json", "config.json", name)):
        path = find(source, each)
        if path is not None:  # …/snapshots/COMMIT/NAME
            return path.parents[len(Path(each).parts) - 1].name
    raise ModelError(f"{repository} at {revision} holds no model: check the name and revision")


def find(source: Source, name: str) -> Path | None:
    """One small file of a source, fetched if need be; None where the source has no such file."""
    if source.kind != "hub":
        path = source.folder / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        cached = try_to_load_from_cache(source.place, name, revision=source.revision)
        if cached is not None:  # its path, or a marker that the repository has no such file
            return Path(cached) if isinstance(cached, str) else None
        return Path(hf_hub_download(source.place, name, revision=source.revision))
    except LocalEntryNotFoundError as error:
        if _cached_snapshot(source) is not None:
            return None  # other files of this commit are in the cache, this one is not
        raise unavailable(source, error) from None
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise unavailable(source, error) from None


def _cached_snapshot(source: Source) -> Path | None:
    """The folder of a commit's cached files, perhaps not all of them; None where there are none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError

    try:
        return Path(
            snapshot_download(source.place, revision=source.revision, local_files_only=True)
        )
    except IncompleteSnapshotError as error:
        return Path(error.snapshot_path)
    except Exception:  # whatever else the cache answers, it has no such snapshot
        return None


def download(source: Source, subfolder: str) -> Path:
    """The folder of a component of a Hub repository: from the cache if it is there whole."""
    from huggingface_hub import snapshot_download

    cached = _cached_snapshot(source)
    if cached is not None and not missing_weights(cached / subfolder):
        return cached / subfolder
    try:
        snapshot = snapshot_download(
            source.place,
            revision=source.revision,
            allow_patterns=[f"{subfolder}/{pattern}".lstrip("/") for pattern in _WANTED],
            ignore_patterns=list(_UNWANTED),
        )
    except Exception as error:
        raise unavailable(source, error) from None
    folder = Path(snapshot) / subfolder
    if not folder.is_dir():
        raise unavailable(source, FileNotFoundError(f"{subfolder} is missing"))
    return folder


def file_of(source: Source, name: str) -> Path:
    """One large file of a Hub repository, downloaded if need be.

    Raises:
        ModelError: it is not to be had.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source.place, name, revision=source.revision))
    except Exception as error:
        raise unavailable(source, error) from None


def sha256_on_hub(source: Source, name: str) -> str:
    """Of a large file of a Hub repository, as the Hub says; nothing is downloaded.

    Raises:
        ModelError: there is no such file, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        infos = HfApi().get_paths_info(source.place, [name], revision=source.revision)
        large = getattr(infos[0], "lfs", None) if infos else None
    except Exception as error:
        raise unavailable(source, error) from None
    if large is None:
        raise ModelError(f"{source.place} has no {name}: check the name and revision")
    return str(large.sha256)


def weight_names(folder: Path) -> list[str]:
    """Names of the safetensors that a component in a folder consists of, those of an index whether
    they are there or not; none where there is neither index nor file.

    Only what transformers' and diffusers' `from_pretrained` look for, in their order: variants
    ("model.fp16.safetensors") are other weights.

    Raises:
        ModelError: the index cannot be read.
    """
    for listing in _LISTINGS:
        if (folder / listing).is_file():
            return named_in_index(folder / listing) if listing.endswith(".json") else [listing]
    return []


def named_in_index(index: Path) -> list[str]:
    """Names of the files that an index of safetensors lists.

    Raises:
        ModelError: it cannot be read.
    """
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ModelError(f"{index} does not say which files hold the weights: download it again")
    return sorted(set(listed.values()))


def sha256_of(path: str | Path) -> str:
    """Of a file's bytes, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def missing_weights(folder: Path) -> str:
    """Name of a weight file that should be in the folder and is not; "" when all are there."""
    names = weight_names(folder)
    if not names:
        return f"{STEMS['transformers']}.safetensors or {STEMS['diffusers']}.safetensors"
    return next((name for name in names if not (folder / name).is_file()), "")


def fingerprint(folder: Path) -> str:
    """A quick identity of a local component: names and sizes of its files, their first and last
    64 KiB. Reading 19 GB for a full checksum would cost more than the stage.
    """
    digest = hashlib.sha256()
    for path in sorted(p for pattern in _WANTED for p in folder.glob(pattern)):
        try:
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            with open(path, "rb") as file:
                digest.update(file.read(_SAMPLED_BYTES))
                file.seek(max(0, size - _SAMPLED_BYTES))
                digest.update(file.read())
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror}): check the file") from None
    return digest.hexdigest()[:40]


def read_json(path: Path) -> dict[str, Any]:
    """A configuration.

    Raises:
        ModelError: not readable, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON ({first_line(error)})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a configuration")
    return value
