"""A spill into system memory under Windows is seen, and nothing else is taken for one."""

import pytest
import torch

from lowvram.memory import meter as metering
from lowvram.memory.report import table
from lowvram.memory.spill import spill_note, windows_below
from lowvram.memory.timeline import COLUMNS, Row

GB = 10**9


def row(reserved: float | None, device: float | None) -> Row:
    known = {"reserved_bytes": reserved, "device_bytes": device}
    return tuple(value * GB if (value := known.get(name)) is not None else None for name in COLUMNS)


def test_windows_below_is_seen() -> None:
    wsl = "Linux version 6.6.87.2-microsoft-standard-WSL2 (root@439a258ad544) (gcc 11.2.0)"
    assert windows_below(wsl) == "WSL"
    assert windows_below("Linux version 6.18.44 (builder@host) (gcc 15.3.0)") is None


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([row(0, 1.5), row(7.5, 7.9)], "(7.90 GB of 8.00 GB) and WSL put 1.00 GB of it into"),
        ([row(0, 1.5), row(6, 7.9)], "WSL put what did not fit into"),  # others have grown
        ([row(0, 1.5), row(6, 7.5)], ""),
        ([row(None, None), row(2, 4), row(5, 7)], ""),  # 2 of the first 4 are ours
        ([row(7.5, None)], ""),
        ([], ""),
    ],
)
def test_a_card_that_is_full(rows: list[Row], says: str) -> None:
    note = spill_note(rows, 8 * GB, "WSL")
    assert says in note if says else note == ""
    assert spill_note(rows, 8 * GB, None) == ""  # there going over is an error
    assert spill_note(rows, None, "WSL") == ""


def test_it_is_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = metering.Meter(torch.device("cuda"))
    meter.timeline.rows = [row(0, 1.5), row(7.5, 7.9)]
    monkeypatch.setattr(metering, "windows_below", lambda: "Windows")
    monkeypatch.setattr(meter._counters, "capacity", lambda: 8 * GB)
    (note,) = meter.notes()
    assert "Prefer No Sysmem Fallback" in note
    assert f"decode: {note}" in table([{"stage": "decode", "notes": [note]}])
