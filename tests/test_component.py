"""What holds while a component is lent."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowvram
from lowvram.component import exact_float32
from lowvram.families.pixart import FAMILY

EXACT = ["ieee", "ieee"]
SETTINGS = (  # by which a process may have allowed TF32 before
    "torch.backends.cudnn.allow_tf32 = True",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.cudnn.fp32_precision = 'tf32'",
    "torch.set_float32_matmul_precision('high')",
)


def precision() -> list[str]:
    places = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    return [str(place.fp32_precision) for place in places]


def test_float32_is_not_rounded_to_tf32() -> None:
    before = precision()
    assert before != EXACT
    with pytest.raises(KeyError), exact_float32():
        assert precision() == EXACT
        raise KeyError
    assert precision() == before


def test_whatever_was_set_before() -> None:
    """In processes of their own: torch refuses to mix its old and its new names for this."""
    code = """
        import sys, torch
        from lowvram.component import exact_float32
        from tests.test_component import EXACT, precision
        exec(sys.argv[1])
        before = precision()
        with exact_float32():
            assert precision() == EXACT
        assert precision() == before
    """
    code = "\n".join(line.strip() for line in code.splitlines()).replace("assert", " assert", 1)
    root = Path(__file__).resolve().parent.parent
    started = [
        subprocess.Popen([sys.executable, "-c", code, setting], cwd=root) for setting in SETTINGS
    ]
    assert [process.wait() for process in started] == [0] * len(SETTINGS)


def test_a_lent_component_computes_so(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []
    encode = type(FAMILY).encode

    def watched(*args: object, **options: object) -> object:
        seen.append(precision())
        return encode(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(FAMILY), "encode", watched)
    lowvram.encode("a cat", str(tiny), output=tmp_path / "x.embeds.safetensors")
    assert seen[-1] == EXACT  # before, for the plan, nothing is computed
