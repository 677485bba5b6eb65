"""Embeddings of single texts, kept so that a text which was encoded once needs no text encoder.

An entry is an artifact of kind "text" under CACHE/embeds, named by what its bytes depend on: the
text encoder by its content, the tokens, how and where it was computed, and the libraries' versions.
What is damaged is made again. At most LOWVRAM_EMBEDS_CACHE is kept (a size; 1GiB unless said
otherwise, "off" for none), those that were used last. Imports no torch.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts
from lowvram.contents import component_key
from lowvram.errors import ArtifactError, LowvramError, ModelError, RequestError, StorageError
from lowvram.files import user_cache
from lowvram.memory.budget import parse_bytes
from lowvram.repository import Model

if TYPE_CHECKING:
    from torch import Tensor

    from lowvram.stages.texts import Text

VARIABLE = "LOWVRAM_EMBEDS_CACHE"
LIMIT_BYTES = 1 << 30  # 4,000 prompts of 30 tokens, or 400 of 300, of T5-XXL
SUFFIX = ".text.safetensors"
_LEFT_OVER_SECONDS = 86_400  # after which a file that was being written is nobody's

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A text in the cache.

    Attributes:
        name: to remove it by: the first digits of its key.
        text: as it was encoded.
        model: that it was first encoded for.
        weights, dtype, device: how.
        used: when last, in seconds since 1970.
    """

    name: str
    text: str
    model: str
    weights: str
    dtype: str
    device: str
    bytes: int
    used: float
    path: Path

    def to_json(self) -> dict[str, Any]:
        """JSON types."""
        return {**asdict(self), "path": str(self.path)}


class EmbedsCache:
    """The texts of one encoder that were computed in one way."""

    def __init__(self, model: Model, encoder: str, weights: str, dtype: str, device: str) -> None:
        """`encoder`: of `encoder_key`. `weights`: see `computed_alike`."""
        packages = ["torch", "transformers"]
        packages += ["bitsandbytes"] if weights in ("8bit", "4bit") else []
        self._model = model.public_record()
        self._facts = {
            "encoder": encoder,
            "weights": weights,
            "dtype": dtype,
            "device": device,
            "versions": {name: metadata.version(name) for name in packages},
        }
        self._broken = False

    def holds(self, text: "Text") -> bool:
        """Whether a text is there, undamaged."""
        try:
            return self._is_of(text, artifacts.verify(self._path(text), "text"))
        except ArtifactError:
            return False

    def get(self, text: "Text") -> "Tensor | None":
        """Its embeddings, `[tokens, channels]` on the host; None where they are not there."""
        path = self._path(text)
        try:
            header, tensors = artifacts.read(path, "text")
        except ArtifactError:
            return None
        with suppress(OSError):  # a cache that may only be read
            os.utime(path)
        return tensors["prompt_embeds"] if self._is_of(text, header) else None

    def put(self, text: "Text", embeds: "Tensor") -> None:
        """Keep the embeddings of a text. A cache that cannot be written is said once."""
        if self._broken:
            return
        items = [{"text": text.says, "tokens": sum(text.mask)}]
        header = artifacts.Header("text", self._model, self._facts_of(text), items)
        try:
            artifacts.write(self._path(text), header, {"prompt_embeds": embeds})
        except StorageError as error:
            self._broken = True
            log.warning("embeddings are not kept for later runs: %s", error)

    def _facts_of(self, text: "Text") -> dict[str, Any]:
        return {**self._facts, "ids": list(text.ids), "mask": list(text.mask)}

    def _path(self, text: "Text") -> Path:
        facts = artifacts.canonical_json(self._facts_of(text))
        digest = hashlib.sha256(facts.encode()).hexdigest()
        return cache_folder() / digest[:2] / f"{digest}{SUFFIX}"

    def _is_of(self, text: "Text", header: artifacts.Header) -> bool:
        return header.settings == self._facts_of(text) and set(header.tensors) == {"prompt_embeds"}


def cache_folder() -> Path:
    """Where entries lie."""
    return user_cache() / "embeds"


def limit_bytes() -> int:
    """What the cache may take; 0 where it is turned off.

    Raises:
        RequestError: the environment variable makes no sense.
    """
    said = os.environ.get(VARIABLE, "").strip()
    if said.lower() in ("off", "0", "no"):
        return 0
    return parse_bytes(VARIABLE, said) or 0 if said else LIMIT_BYTES


def computed_alike(weights: str, device: str) -> str:
    """Under which name a strategy's embeddings are kept.

    On a CPU streamed weights compute the same bits as resident ones, which tests compare. On other
    devices nobody has compared them yet: each is kept for itself.
    """
    return "lossless" if device == "cpu" and weights in ("whole", "stream") else weights


def encoder_key(model: Model) -> str | None:
    """The text encoder by its content; None where it is neither here nor known from before.

    Of a commit on the Hub it is noted, so that texts in the cache need no weights, and no network.
    """
    component, source = model.get_family().component("text_encoder"), model.sources["text_encoder"]
    said = artifacts.canonical_json([component.class_name, component.subfolder, asdict(source)])
    note = cache_folder() / "encoders" / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.json"
    if source.kind == "hub":
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(note.read_text(encoding="utf-8"))["key"])
    try:
        key = component_key(model, "text_encoder")
    except ModelError:
        return None
    if source.kind == "hub":
        with suppress(LowvramError):  # a cache that cannot be written costs time only
            artifacts.write_bytes(note, artifacts.canonical_json({"key": key}).encode())
    return key


def list_entries() -> list[Entry]:
    """What is kept, the last used first."""
    found = [entry for path in _files() if (entry := _entry(path)) is not None]
    return sorted(found, key=lambda entry: (-entry.used, entry.name))


def remove(name: str | None = None, older_than: float | None = None) -> tuple[int, int]:
    """Delete entries.

    Args:
        name: the first digits of an entry's key; None for all.
        older_than: seconds since the last use; None for any.

    Returns:
        how many, and the bytes that they took.

    Raises:
        RequestError: nothing, or more than one, has that name.
        StorageError: a file cannot be deleted.
    """
    paths = list(_files())
    if name is not None:
        paths = [path for path in paths if path.name.startswith(name.lower())]
        if not paths or not name:
            raise RequestError(f"nothing in the cache is called {name!r}: see lowvram cache ls")
        if len(paths) > 1:
            raise RequestError(f"{len(paths)} entries begin with {name}: name more of its digits")
    count = freed = 0
    for path in paths:
        with suppress(FileNotFoundError):  # another process was faster
            status = path.stat()
            if older_than is None or time.time() - status.st_mtime > older_than:
                _unlink(path)
                count, freed = count + 1, freed + status.st_size
    _sweep(0 if name is None and older_than is None else _LEFT_OVER_SECONDS)
    return count, freed


def trim(limit: int) -> None:
    """Delete what was used longest ago, until the cache takes no more than `limit` bytes."""
    known = []
    for path in _files():
        with suppress(FileNotFoundError):
            status = path.stat()
            known.append((status.st_mtime_ns, status.st_size, path))
    too_much = sum(size for _, size, _ in known) - limit
    for _, size, path in sorted(known):
        if too_much <= 0:
            break
        with suppress(FileNotFoundError, StorageError):
            _unlink(path)
        too_much -= size
    _sweep(_LEFT_OVER_SECONDS)


def total_bytes() -> int:
    """What all entries take."""
    return sum(path.stat().st_size for path in _files())


def _files() -> Iterator[Path]:
    yield from sorted(cache_folder().glob(f"??/[0-9a-f]*{SUFFIX}"))


def _sweep(seconds: float) -> None:
    """Delete what was left half written so long ago."""
    for path in cache_folder().glob("??/.*.part"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime >= seconds:
                path.unlink()


def _unlink(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"{path} cannot be deleted ({error.strerror})") from None


def _entry(path: Path) -> Entry | None:
    """None for what is gone meanwhile; what is damaged is listed without its text."""
    try:
        status = path.stat()
        header = artifacts.read_header(path, "text")
        text, settings, model = header.items[0]["text"], header.settings, header.model
    except FileNotFoundError:
        return None
    except (ArtifactError, LookupError, TypeError):
        text, settings, model = "(damaged)", {}, {}
    weights, dtype, device = (str(settings.get(n, "")) for n in ("weights", "dtype", "device"))
    return Entry(
        path.name[:12],
        str(text),
        str(model.get("name", "")),
        weights,
        dtype,
        device,
        status.st_size,
        status.st_mtime,
        path,
    )
