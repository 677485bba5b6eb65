"""The files between the stages: written atomically, verified before use, self-describing.

An artifact is one safetensors file whose single metadata key, `lowvram`, holds canonical JSON (a
`Header` and its key). The header carries the sha256 of every tensor, and its own sha256 is the
artifact's key: same key, same bytes. Headers are read and files verified without torch.
docs/files.md describes the format.
"""

import errno
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.errors import ArtifactError, storage_error

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
METADATA_KEY = "lowvram"
SUFFIXES = {"embeds": ".embeds.safetensors", "latents": ".latents.safetensors"}

# What makes each kind: the stage to name when a file of that kind is wanted.
_MADE_BY = {"embeds": "encode", "latents": "denoise", "checkpoint": "denoise", "text": "encode"}
_AS_SAID = {"checkpoint": "a checkpoint"}
_NEEDED = {"checkpoint": "a checkpoint is needed: delete or move this file"}
_CHUNK_BYTES = 1 << 20
_MAX_HEADER_BYTES = 100_000_000  # the limit in the safetensors specification


@dataclass(frozen=True)
class Header:
    """What an artifact says of itself.

    Attributes:
        kind: "embeds" or "latents"; "checkpoint" for denoising that has not ended, "text" for a
            text's embeddings in the cache.
        model: the model's record (`repository.Model.record`): later stages find it from here.
        settings: every setting that changed a byte, JSON types only; and "stage" where the file was
            made by another than the usual one.
        items: one record per prompt (embeds) or per picture (latents), in order.
        made_from: key of the artifact that this one was computed from, "" where there is none.
        tensors: name to {"dtype", "shape", "sha256"}; filled in by `write`.
        version: of the format.
    """

    kind: str
    model: dict[str, Any]
    settings: dict[str, Any]
    items: list[dict[str, Any]]
    made_from: str = ""
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    @property
    def key(self) -> str:
        """sha256 of the canonical header, which holds the sha256 of each tensor."""
        return hashlib.sha256(canonical_json(asdict(self)).encode()).hexdigest()


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def write(path: Path, header: Header, tensors: Mapping[str, "Tensor"]) -> Header:
    """Write an artifact atomically.

    Args:
        path: where it shall be; replaced in one step if it exists.
        header: everything but `tensors`, which is computed here.
        tensors: on any device, any dtype.

    Returns:
        the header as written.

    Raises:
        StorageError: no space, or the folder cannot be written.
    """
    import torch
    from safetensors.torch import save

    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "sha256": hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest(),
        }
        for name, tensor in on_host.items()
    }
    header = replace(header, tensors=described)
    text = canonical_json({**asdict(header), "key": header.key})
    write_bytes(path, save(on_host, metadata={METADATA_KEY: text}))
    return header


def read_header(path: Path, kind: str | None = None) -> Header:
    """The header of an artifact, without torch and without reading its tensors.

    Raises:
        ArtifactError: no such file, not an artifact, of another kind, or of a newer format.
    """
    return _parse(path, kind)[0]


def read(path: Path, kind: str) -> tuple[Header, dict[str, "Tensor"]]:
    """An artifact's header and tensors (on the CPU), verified first.

    Raises:
        ArtifactError: as `read_header`, and when a tensor's bytes are not what was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = verify(path, kind)
    try:
        tensors = load_file(path)
    except SafetensorError:
        raise _damaged(path, header, "its list of tensors") from None
    except FileNotFoundError:  # deleted since it was verified
        raise ArtifactError(f"{path} does not exist: check the path") from None
    for name, tensor in tensors.items():
        described = header.tensors[name]
        if [str(tensor.dtype), list(tensor.shape)] != [
            f"torch.{described['dtype']}",
            described["shape"],
        ]:
            raise _damaged(path, header, f"tensor {name}")
    return header, tensors


def verify(path: Path, kind: str) -> Header:
    """Check every tensor's bytes against the header, and return the header.

    Raises:
        ArtifactError: names the file and the tensor that is damaged.
    """
    header, offsets, start = _parse(path, kind)
    if set(offsets) != set(header.tensors):
        raise _damaged(path, header, "its list of tensors")
    try:
        with open(path, "rb") as file:
            for name, (begin, end) in offsets.items():
                file.seek(start + begin)
                if _sha256(file, end - begin) != header.tensors[name]["sha256"]:
                    raise _damaged(path, header, f"tensor {name}")
    except OSError as error:  # deleted since, or its disk fails
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): check the path") from None
    return header


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut.

    Raises:
        StorageError: no space, or the folder cannot be written; nothing is left behind.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not of the file's own name, beside which there may be no room in a name.
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=".", suffix=".part", delete=False
        ) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        fsync_folder(path.parent)
    except OSError as error:
        error.filename = str(path)
        raise storage_error(error, "saving") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


class _NewerFormatError(Exception):
    """Written by a later version of this package."""


def _parse(path: Path, kind: str | None) -> tuple[Header, dict[str, tuple[int, int]], int]:
    """Header, byte range of each tensor, and where the tensors' bytes start."""
    try:
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise ValueError("not a safetensors file")
            listing = json.loads(file.read(length))
            size = file.seek(0, os.SEEK_END)
        metadata = listing.pop("__metadata__", {}).get(METADATA_KEY)
        if metadata is None:
            raise ValueError("a safetensors file that lowvram did not write")
        header = _checked(json.loads(metadata))
        offsets = {name: tuple(entry["data_offsets"]) for name, entry in listing.items()}
    except _NewerFormatError as error:
        raise ArtifactError(
            f"{path} has format {error}, newer than {FORMAT_VERSION}: update lowvram"
        ) from None
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        wanted = f"{_MADE_BY[kind]} writes the file that is needed here" if kind else "encode again"
        reason = str(error) if type(error) is ValueError else "its header makes no sense"
        raise ArtifactError(f"{path} is not an artifact ({reason}): lowvram {wanted}") from None
    if kind is not None and header.kind != kind:
        raise ArtifactError(
            f"{path} holds {_AS_SAID.get(header.kind, header.kind)}, but "
            f"{_NEEDED.get(kind, f'{kind} are needed: make them with lowvram {_MADE_BY[kind]}')}"
        )
    start = 8 + length
    if max((end for _, end in offsets.values()), default=0) != size - start:
        raise ArtifactError(f"{path} is truncated or has a tail: {_again(header)}")
    return header, offsets, start


def _checked(value: Any) -> Header:
    """A `Header` from parsed JSON; ValueError and its kin when a field is missing or odd."""
    if type(value["version"]) is int and value["version"] > FORMAT_VERSION:
        raise _NewerFormatError(value["version"])
    key = value.pop("key")
    header = Header(**value)
    if header.key != key:
        raise ValueError("its header is damaged")
    types = {"kind": str, "model": dict, "settings": dict, "items": list, "made_from": str}
    if any(not isinstance(getattr(header, name), kind) for name, kind in types.items()):
        raise ValueError("its header has fields of the wrong type")
    if header.kind not in _MADE_BY or header.version != FORMAT_VERSION:
        raise ValueError("its kind or version is unknown")
    if not all(isinstance(entry["sha256"], str) for entry in header.tensors.values()):
        raise ValueError("its header names tensors without a checksum")
    return header


def _damaged(path: Path, header: Header, part: str) -> ArtifactError:
    return ArtifactError(f"{path} is damaged ({part}): {_again(header)}")


def _again(header: Header) -> str:
    return f"make it again with lowvram {header.settings.get('stage', _MADE_BY[header.kind])}"


def _sha256(file: Any, size: int) -> str:
    digest = hashlib.sha256()
    while size > 0:
        chunk = file.read(min(size, _CHUNK_BYTES))
        if not chunk:
            break
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fsync_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows cannot open a folder for this
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)
