"""Windows lends a full graphics card memory of the system: without an error, some 8 times slower.

That is a spill. The driver tells nobody that it happens, so that it is seen by its cause: what this
process reserved and what others held was more than the card has, or the card was full to the brim.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from lowvram.memory.plan import show
from lowvram.memory.timeline import COLUMNS, Row

NO_SPILL = (
    "NVIDIA Control Panel > Manage 3D settings > CUDA - Sysmem Fallback Policy: "
    "Prefer No Sysmem Fallback"
)
_FULL = 0.98  # of a card's memory: some is never given out

_RESERVED, _DEVICE = COLUMNS.index("reserved_bytes"), COLUMNS.index("device_bytes")


def windows_below(version: str | None = None) -> str | None:
    """Whether Windows manages the device's memory: "Windows", "WSL" or None.

    Args:
        version: the text of /proc/version; None to read it.
    """
    if version is None:
        if sys.platform == "win32":
            return "Windows"
        try:
            version = Path("/proc/version").read_text(encoding="utf-8", errors="replace")
        except OSError:  # not Linux
            version = ""
    return "WSL" if "microsoft" in version.lower() else None


def spill_note(rows: Sequence[Row], total: int | None, below: str | None) -> str:
    """What is to be said of a stage that spilled, with the way out; "" where it did not.

    Args:
        rows: of a timeline.
        total: bytes that the card has; None where nobody says.
        below: as `windows_below`; without Windows going over is an error.
    """
    known = [
        (reserved, used)
        for row in rows
        if (reserved := row[_RESERVED]) is not None and (used := row[_DEVICE]) is not None
    ]
    if not below or not total or not known:
        return ""
    others = known[0][1] - known[0][0]  # and our context
    over = int(max(reserved for reserved, _ in known) + others - total)
    fullest = int(max(used for _, used in known))
    if over <= 0 and fullest < _FULL * total:
        return ""
    much = f"{show(over)} of it" if over > 0 else "what did not fit"
    return (
        f"the card was full ({show(fullest)} of {show(total)}) and {below} put {much} into system "
        f"memory, some 8 times slower: close other programs or use a smaller --vram; {NO_SPILL}"
    )
