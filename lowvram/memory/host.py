"""What of the host's memory can be taken: what is free, or what a container's limit leaves."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Of Linux's control groups: admin-guide/cgroup-v2 and cgroup-v1/memory of docs.kernel.org.
_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_V2 = ("memory.max", "memory.current")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_CACHES = ("inactive_file", "active_file")  # given back when memory is short


def available_bytes() -> int:
    """Bytes that this process could take without swapping, or being killed for a limit."""
    import psutil

    return min([int(psutil.virtual_memory().available), *_left_by_limits()])


def _left_by_limits() -> Iterator[int]:
    """Of each group with a limit that this process is in."""
    with suppress(OSError, ValueError):  # no Linux, or none of these groups
        for line in _OWN.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _left_in(_GROUPS, path, *_V2)
            elif "memory" in controllers.split(","):
                yield from _left_in(_GROUPS / "memory", path, *_V1)


def _left_in(root: Path, path: str, limit: str, used: str) -> Iterator[int]:
    """Of a group and those above it; in a container only the root may be there."""
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):  # not there, or "max" for no limit
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            told = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # the first version counts what lies below in a line of its own
            yield max(0, left + sum(int(told.get(f"total_{c}", told.get(c, 0))) for c in _CACHES))
        if folder == root:
            return
