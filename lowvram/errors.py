"""What can go wrong, with the exit code of each.

LowvramError                 1  anything below
├── RequestError             2  what was asked cannot be done: a size, an option, an empty prompt
├── ModelError               3  no such model, not downloaded, or its files are broken
├── ArtifactError            4  a file between the stages is wrong, truncated or foreign
├── DeviceError              5  no such device, or it cannot do what was asked
├── MemoryExhaustedError     6  the device or the machine ran out of memory
│   └── NothingSmallerError  6  and there is no way of working left that takes less
├── StorageError             7  a file could not be written: no space, no permission
├── NonFiniteError           8  a stage computed NaN or infinity
├── StageDiedError           9  a stage's process ended without an answer
└── RowsFailedError         10  some rows of a list could not be done; the others were

Ctrl-C exits with 130. Every message is one line: what was wrong, the value, the way out.
Library code raises these; `translated()` turns foreign errors into them at the boundary.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class LowvramError(Exception):
    """Anything this package refuses or fails to do."""

    exit_code = 1


class RequestError(LowvramError):
    """What was asked cannot be done: a size, an option, an empty prompt."""

    exit_code = 2


class ModelError(LowvramError):
    """No such model, not downloaded, or its files are broken."""

    exit_code = 3


class ArtifactError(LowvramError):
    """A file between the stages is wrong, truncated or foreign."""

    exit_code = 4


class DeviceError(LowvramError):
    """No such device, or it cannot do what was asked."""

    exit_code = 5


class MemoryExhaustedError(LowvramError):
    """The device or the machine ran out of memory."""

    exit_code = 6


class NothingSmallerError(MemoryExhaustedError):
    """Out of memory, and there is no way of working left that takes less."""


class StorageError(LowvramError):
    """A file could not be written: no space, no permission."""

    exit_code = 7


class NonFiniteError(LowvramError):
    """A stage computed NaN or infinity."""

    exit_code = 8


class StageDiedError(LowvramError):
    """A stage's process ended without an answer."""

    exit_code = 9


class RowsFailedError(LowvramError):
    """Some rows of a list could not be done; the others were."""

    exit_code = 10


INTERRUPTED_EXIT_CODE = 130

# The way out of an out-of-memory, by stage; for what else is done see `less_memory`.
_LESS_MEMORY = {
    "encode": "use --weights stream (run: --encoder-weights stream), or --stage-budget 1GiB",
    "denoise": "use --stage-budget 1GiB, --batch-size 1 or a smaller --size",
    "decode": "use --decode strips, or --stage-budget 0.5GiB",
    "encode-image": "use --encode strips, or --stage-budget 0.5GiB",
}

NO_SPACE = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}

# The ways in which torch and the libraries of a GPU say "out of memory", in lower case and with
# spaces for "_". Class names are matched too, so that this file needs no torch.
_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, HIP, MPS and most libraries
    "blas status alloc failed",  # cuBLAS and hipBLAS
    "cublas status not initialized when calling `cublascreate",  # there is no room for its handle
    "cudnn status alloc failed",
    "device allocation failed",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "miopenstatusallocfailed",
    "result error out of device memory",  # Level Zero, for Intel's GPUs
    "result error out of host memory",
    "can't allocate memory",
    "not enough memory",
    # cuDNN, when no algorithm's workspace could be allocated: "GET was unable to find an engine …"
    "unable to find an engine",
)


def less_memory(stage: str) -> str:
    """What to do when a stage, or whatever else is done, ran out of memory."""
    ways = ("close other programs", _LESS_MEMORY.get(stage))
    return ", or ".join(way for way in ways if way)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is one of the spellings of "out of memory"."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error).lower().replace("_", " ")
    return isinstance(error, RuntimeError) and any(each in said for each in _OUT_OF_MEMORY)


@contextmanager
def translated(stage: str) -> Iterator[None]:
    """Turn out-of-memory and "no space" met in a stage into errors of this package.

    Raises:
        MemoryExhaustedError, StorageError: for what they name; any other error passes through.
    """
    try:
        yield
    except LowvramError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryExhaustedError(
                f"{stage} ran out of memory ({first_line(error)[:200]}): {less_memory(stage)}"
            ) from None
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise storage_error(error, stage) from None
        raise


def storage_error(error: OSError, doing: str) -> StorageError:
    """The `StorageError` that says what `error` means for the user."""
    path = error.filename or "the output"
    way_out = "free some space" if error.errno in NO_SPACE else "choose another place with -o"
    return StorageError(f"{doing} could not write {path} ({error.strerror}): {way_out}")


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, or its class's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
