"""The doctor: every check alone, nothing private in what it says, and self-tests that can fail."""

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram import cli, devices, doctor, errors, selftests, versions
from lowvram.diagnosis import Diagnosis, Row, private
from lowvram.memory import capacity, rates

CPU = torch.device("cpu")
NAMES = {
    "system": {"system", "Windows or WSL"},
    "device": {"device", "torch built for", "driver", "compute capability"},
    "memory": {"mem_get_info", "nvml", "torch.accelerator", "counted on", "RAM", "swap"},
    "rates": {"measured", "disk", "host to device", "context", "cuBLAS"}
    | {f"{dtype} product" for dtype in rates.DTYPES},
    "runs here": {"bfloat16", "int8", "nf4", "pinned memory"},
    "caches": {"downloads", "prepared", "embeds"},
}


@pytest.fixture(autouse=True)
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user with a name and empty caches in the home folder."""
    home = tmp_path / "home" / "zoe"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("LOGNAME", "zoe")
    monkeypatch.setenv("LOWVRAM_CACHE", str(home / "caches"))
    monkeypatch.setattr(doctor.files, "hub_cache", lambda: home / "hub")


def broken_mm(*arguments: Any, **named: Any) -> torch.Tensor:
    return torch.ones(32, 128, dtype=torch.bfloat16)


def test_json_is_one_document_of_a_known_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.exit_code(["doctor", "--quick", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"version", "ok", "checks"}
    assert document["ok"] is True
    packages = document["checks"].pop("packages")
    assert {"lowvram", "python", "torch", "diffusers", "bitsandbytes"} <= set(packages)
    assert packages["torch"]["value"]["version"] == torch.__version__
    assert packages["torch"]["value"]["needs"].startswith("torch>=2.")
    assert {group: set(rows) for group, rows in document["checks"].items()} == NAMES
    for rows in document["checks"].values():
        for row in rows.values():
            assert set(row) == {"state", "text", "value"}
            assert row["state"] in ("ok", "unknown", "note")
    ram = document["checks"]["memory"]["RAM"]["value"]
    assert 0 < ram["free_bytes"] <= ram["total_bytes"]


def test_text_is_aligned_and_names_no_home(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "home" / "zoe" / "hub"
    (hub / "models--a--b" / "blobs").mkdir(parents=True)
    (hub / "models--a--b" / "blobs" / "x").write_bytes(bytes(20_000_000))

    def fail(device: torch.device) -> bool:
        raise OSError(f"cannot open {tmp_path}/home/zoe/secret, nor /media/zoe/disk")

    monkeypatch.setattr(selftests, "pins_memory", fail)
    assert cli.exit_code(["doctor", "--quick"]) == 0
    text = capsys.readouterr().out
    assert "zoe" not in text
    assert "0.02 GB  ~" in text
    assert "cannot open ~" in text
    assert "nor /media/USER/disk" in text
    column = text.index("Linux") if "Linux" in text else None
    rows = [line for line in text.splitlines() if line[:2] in ("  ", "! ", "X ")]
    assert len(rows) > 40
    if column is not None:
        start = column - (text.rindex("\n", 0, column) + 1)
        assert {line[start - 2 : start] for line in rows} == {"  "}
        assert all(line[start] != " " for line in rows)
    assert "\x1b" not in text


def test_private_spares_what_only_looks_like_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/root")
    monkeypatch.setenv("USERPROFILE", "/root")
    monkeypatch.setattr("getpass.getuser", lambda: "root")
    assert private("/root/x /rootfs/x /mnt/root (/root)") == "~/x /rootfs/x /mnt/root (~)"
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setenv("USERPROFILE", "/")
    assert private("1 / 2 of /opt/x") == "1 / 2 of /opt/x"


@pytest.mark.parametrize(
    ("target", "name", "group", "shown", "code"),
    [
        (metadata, "requires", "packages", "packages", 5),
        (versions, "check", "packages", "torch", 5),
        (devices, "device_name", "device", "device", 5),
        (capacity, "count_device", "memory", "device memory", 0),
        ("psutil", "virtual_memory", "memory", "RAM", 0),
        (rates, "recall", "rates", "rates", 0),
        (selftests, "check_bfloat16", "runs here", "bfloat16", 5),
        (selftests, "check_quantized", "runs here", "nf4", 0),
        (selftests, "pins_memory", "runs here", "pinned memory", 0),
        (doctor.files, "hub_cache", "caches", "downloads", 0),
        (doctor.prepared, "list_prepared", "caches", "prepared", 0),
    ],
)
def test_a_check_that_fails_is_a_row(
    target: Any,
    name: str,
    group: str,
    shown: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("it is broken\nin two lines")

    if isinstance(target, str):
        target = pytest.importorskip(target)
    monkeypatch.setattr(target, name, fail)
    assert cli.exit_code(["doctor", "--quick", "--json"]) == code
    out, err = capsys.readouterr()
    document = json.loads(out)
    row = document["checks"][group][shown]
    assert row == {"state": "failed", "text": "failed: RuntimeError: it is broken", "value": None}
    assert document["ok"] is (code == 0)
    assert len(document["checks"]) == len(NAMES) + 1
    assert "Traceback" not in err
    if code:
        assert err.splitlines()[-1].startswith("lowvram: needed here and not working: ")
        assert shown in err


def test_no_device_at_all_is_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> torch.device:
        raise errors.DeviceError("the driver is gone")

    monkeypatch.setattr(devices, "choose_device", fail)
    found = doctor.diagnose(quick=False)
    failed = {row.name for row in found.rows if row.state == "failed"}
    alone = {"device", "device memory", "rates"}
    assert failed == alone | {"bfloat16", "int8", "nf4", "pinned memory"}
    assert found.broken == ["device", "bfloat16"]


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_device_whose_calls_all_fail_is_rows_too(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.accelerator.is_available():
        pytest.skip("a device whose calls work")
    monkeypatch.setattr(devices, "choose_device", lambda name: torch.device(kind))
    found = doctor.diagnose(quick=False)
    rows = {row.name: row for row in found.rows}
    assert len(found.rows) > 30
    assert rows["counted on"].value is None
    assert rows["int8"].state == "failed"
    assert set(found.broken) & {"device", "bfloat16"}
    assert found.to_text().endswith(", ".join(found.broken))
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("installed", "state"), [("2.9.1+cu128", "below"), ("2.10.0", "ok"), (None, "missing")]
)
def test_floors_are_those_of_the_metadata(
    installed: str | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name != "torch":
            return real(name)
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(metadata, "version", version)
    declared = ["torch>=2.10", "pynvml>=1; sys_platform == 'nowhere'", 'ruff>=1; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: declared)
    found = Diagnosis(tuple(doctor._packages()))
    assert [row.name for row in found.rows] == ["lowvram", "python", "torch"]
    row = found.rows[-1]
    assert (row.state, row.value) == (state, {"version": installed, "needs": "torch>=2.10"})
    assert found.broken == ([] if state == "ok" else ["torch"])
    line = found.to_text().splitlines()[3]
    assert line.startswith("  torch " if state == "ok" else "X torch ")
    assert ('pip install -U "torch>=2.10"' in line) is (state != "ok")


def test_an_old_python_is_marked() -> None:
    assert versions.check_python("3.10.9").state == "below"
    assert versions.check_python("3.11.0").state == "ok"


def test_windows_below_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    wsl = "Linux version 6.6.87.2-microsoft-standard-WSL2 (root@439a258ad544) (gcc 11.2.0)"
    assert doctor.windows_below(wsl) == "WSL"
    assert doctor.windows_below("Linux version 6.18.44 (builder@host) (gcc 15.3.0)") is None
    monkeypatch.setattr(doctor, "windows_below", lambda: "WSL")
    row = list(doctor._system())[-1]
    assert (row.state, row.value) == ("note", "WSL")
    assert "CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback" in row.text


def test_self_tests_pass_here() -> None:
    for found in (
        selftests.check_bfloat16(CPU),
        selftests.check_quantized(8, CPU),
        selftests.check_quantized(4, CPU),
    ):
        assert found.works
        assert 0 < found.error < found.bound
    assert selftests.pins_memory(CPU) is None


def test_a_wrong_bfloat16_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "mm", broken_mm)
    assert not selftests.check_bfloat16(CPU).works
    row = next(doctor._bfloat16())
    assert row.is_broken
    assert row.text.startswith("computes nonsense")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("factor", [0.0, 1.3, float("nan")])
def test_a_wrong_quantised_layer_is_found(
    bits: int, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.nn import modules

    kind = {8: modules.Linear8bitLt, 4: modules.Linear4bit}[bits]
    real = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: real(self, x) * factor)
    assert not selftests.check_quantized(bits, CPU).works
    row = next(doctor._quantized(bits))
    assert row.state == "failed"
    json.dumps(row.value, allow_nan=False)


@pytest.mark.parametrize(("device", "needed"), [("cpu", False), ("cuda", True)])
def test_8_bits_are_needed_where_encode_takes_them(
    device: str, needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "choose_device", lambda name: torch.device(device))
    wrong = selftests.Outcome(1.0, 0.1)
    monkeypatch.setattr(selftests, "check_quantized", lambda bits, device: wrong)
    assert next(doctor._quantized(8)).is_broken is needed
    assert not next(doctor._quantized(4)).is_broken


def test_a_card_that_torch_does_not_see_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "choose_device", lambda name: CPU)
    monkeypatch.setattr(capacity, "nvml_names", lambda: ["NVIDIA GeForce RTX 3060"])
    row = next(doctor._device())
    assert row.state == "note"
    assert "NVIDIA GeForce RTX 3060 is here, but torch" in row.text


def test_rates_are_measured_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    monkeypatch.setattr(devices, "choose_device", lambda name: CPU)
    found = rates.Rates(2e9, "3 MB of a file", None, {"float32": 5e10}, None, None, "2026-11-25")

    def measure(device: str) -> rates.Rates:
        measured.append(device)
        return found

    monkeypatch.setattr(rates, "measure", measure)
    before = {row.name: row for row in doctor._rates(quick=True)}
    assert (measured, before["disk"].value, before["measured"].state) == ([], None, "unknown")
    rows = {row.name: row for row in doctor._rates(quick=False)}
    assert measured == ["cpu"]
    assert rows["disk"].text == "2.00 GB/s (3 MB of a file)"
    assert rows["float32 product"].text == "50.0 GFLOP/s"
    assert rows["bfloat16 product"].state == rows["context"].state == "unknown"
    assert {row.name: row for row in doctor._rates(quick=True)} == rows
    assert measured == ["cpu"]


def test_a_cache_that_cannot_be_written_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: str, found: rates.Rates) -> None:
        raise errors.StorageError("saving could not write rates.json")

    monkeypatch.setattr(rates, "measure", rates.assumed)
    monkeypatch.setattr(rates, "remember", full)
    rows = list(doctor._rates(quick=False))
    assert rows[0].state == "note"
    assert "not remembered: saving could not write rates.json" in rows[0].text
    assert rows[1].value == rates.assumed("cpu").disk_bytes_per_second


def test_what_a_library_prints_stays_off_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty() -> Iterator[Row]:
        print("welcome to a library")
        yield Row("system", "system", "x")

    monkeypatch.setattr(doctor, "_system", chatty)
    assert cli.exit_code(["doctor", "--quick", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["ok"]
    assert "welcome" in err
