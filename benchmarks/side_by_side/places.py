"""Where the checkpoints of the benchmark lie. Imports nothing that takes time."""

from collections.abc import Iterable
from pathlib import Path

_SETTINGS = ".make_checkpoint.json"  # as scripts/make_checkpoint.py writes it: empty until the end


def place(folder: Path, side: int) -> Path:
    """The checkpoint for pictures of that side, px."""
    return folder / f"sigma-{side}"


def finished(model: Path) -> bool:
    """Whether a checkpoint of scripts/make_checkpoint.py was written to its end."""
    settings = model / _SETTINGS
    return settings.is_file() and bool(settings.read_text(encoding="utf-8"))


def is_made(folder: Path, sides: Iterable[int], base: int) -> bool:
    """Whether all of it is there.

    Args:
        base: the side whose files were written; the others are links.
    """
    return finished(place(folder, base)) and all(
        (place(folder, side) / "transformer").is_dir() for side in sides
    )
