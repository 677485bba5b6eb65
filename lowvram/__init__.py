"""Pictures from diffusion transformers on small graphics cards, in three stages that run alone."""

from lowvram.api import decode, denoise, encode, encode_image, interpolate
from lowvram.errors import (
    ArtifactError,
    DeviceError,
    LowvramError,
    MemoryExhaustedError,
    ModelError,
    NonFiniteError,
    RequestError,
    StageDiedError,
    StorageError,
)
from lowvram.families.family import Size
from lowvram.progress import Progress
from lowvram.refining import refine
from lowvram.run import Picture, RunResult, run

__all__ = [
    "ArtifactError",
    "DeviceError",
    "LowvramError",
    "MemoryExhaustedError",
    "ModelError",
    "NonFiniteError",
    "Picture",
    "Progress",
    "RequestError",
    "RunResult",
    "Size",
    "StageDiedError",
    "StorageError",
    "decode",
    "denoise",
    "encode",
    "encode_image",
    "interpolate",
    "refine",
    "run",
]
