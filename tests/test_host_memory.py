"""What of the host's memory can be taken, in containers too."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from lowvram.memory import host

GB = 10**9


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a test writes control groups; 8 GB are free on the machine."""
    monkeypatch.setattr(host, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(host, "_OWN", tmp_path / "own")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=8 * GB))
    return tmp_path


def group(
    folder: Path, names: tuple[str, str], limit: object, used: int, stat: str = "anon 0"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip((*names, "memory.stat"), (limit, used, stat), strict=True):
        (folder / name).write_text(f"{value}\n")


def test_without_limits_it_is_what_is_free(groups: Path) -> None:
    assert host.available_bytes() == 8 * GB  # no Linux
    (groups / "own").write_text("0::/user.slice\n")
    assert host.available_bytes() == 8 * GB  # no such group
    group(groups / "groups" / "user.slice", host._V2, "max", 5)
    assert host.available_bytes() == 8 * GB
    (groups / "own").write_text("damaged")
    assert host.available_bytes() == 8 * GB


def test_a_containers_limit_counts(groups: Path) -> None:
    """As Docker has it: the group is called as on the host, and only its own files are there."""
    (groups / "own").write_text("0::/docker/abc\n")
    caches = f"anon 1\nactive_file {GB // 2}\ninactive_file {GB // 4}\nfile_mapped 7"
    group(groups / "groups", host._V2, 4 * GB, 3 * GB, caches)
    assert host.available_bytes() == 4 * GB - 3 * GB + 3 * GB // 4
    group(groups / "groups", host._V2, 4 * GB, 5 * GB)
    assert host.available_bytes() == 0


def test_the_least_of_the_groups_above_counts(groups: Path) -> None:
    (groups / "own").write_text("0::/a/b\n")
    group(groups / "groups" / "a" / "b", host._V2, 6 * GB, GB)
    group(groups / "groups" / "a", host._V2, 4 * GB, 2 * GB)
    assert host.available_bytes() == 2 * GB


def test_the_first_version_of_groups(groups: Path) -> None:
    (groups / "own").write_text("5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n")
    caches = f"active_file 1\ntotal_active_file {GB}\ntotal_inactive_file {GB}"
    group(groups / "groups" / "memory" / "x", host._V1, 5 * GB, 4 * GB, caches)
    group(groups / "groups" / "memory", host._V1, 2**63 - 4096, 6 * GB)
    assert host.available_bytes() == 3 * GB
