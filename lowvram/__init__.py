"""Pictures from diffusion transformers on small graphics cards, in stages that run alone."""

from lowvram.api import decode, denoise, encode, encode_image, interpolate
from lowvram.batch import BatchResult, RowResult, run_many
from lowvram.compare.comparison import Comparison, compare
from lowvram.errors import (
    ArtifactError,
    DeviceError,
    LowvramError,
    MemoryExhaustedError,
    ModelError,
    NonFiniteError,
    RequestError,
    RowsFailedError,
    StageDiedError,
    StorageError,
)
from lowvram.families.family import Size
from lowvram.progress import Progress
from lowvram.refining import refine
from lowvram.rows import Row
from lowvram.run import Picture, RunResult, run

__all__ = [
    "ArtifactError",
    "BatchResult",
    "Comparison",
    "DeviceError",
    "LowvramError",
    "MemoryExhaustedError",
    "ModelError",
    "NonFiniteError",
    "Picture",
    "Progress",
    "RequestError",
    "Row",
    "RowResult",
    "RowsFailedError",
    "RunResult",
    "Size",
    "StageDiedError",
    "StorageError",
    "compare",
    "decode",
    "denoise",
    "encode",
    "encode_image",
    "interpolate",
    "refine",
    "run",
    "run_many",
]
