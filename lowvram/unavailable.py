"""Why something could not be had from the Hub, in one line with the way out."""

from typing import TYPE_CHECKING

from lowvram.errors import NO_SPACE, LowvramError, ModelError, storage_error

if TYPE_CHECKING:
    from lowvram.files import Source


def unavailable(source: "Source", error: Exception) -> LowvramError:
    """What a client's error means for the user, and the way out."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return storage_error(error, "the download")
    if isinstance(error, HFValidationError):
        return ModelError(f"{source.place!r} is no repository's name: it has the form owner/name")
    if isinstance(error, GatedRepoError):
        return ModelError(
            f"{source.place} is gated: accept its terms on the Hub, then hf auth login"
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(f"no repository {source.place} on the Hub: check the name")
    if isinstance(error, RevisionNotFoundError):
        return ModelError(f"{source.place} has no revision {source.revision}: check --revision")
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else type(error).__name__
    return ModelError(
        f"{source.place} is not in the cache and the Hub cannot be reached ({why}): "
        f"run {download_command(source)} where there is a network"
    )


def download_command(source: "Source") -> str:
    """Of the Hub's own program, for the very commit."""
    revision = "" if source.revision in ("", "main") else f" --revision {source.revision}"
    return f"hf download {source.place}{revision}"
