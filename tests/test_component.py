"""What holds while a component is lent."""

from pathlib import Path

import pytest
import torch

import lowvram
from lowvram.component import exact_float32
from lowvram.families.pixart import FAMILY


def allowed() -> list[bool]:
    return [torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32]


def test_float32_is_not_rounded_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = allowed()
    assert before[0]
    with pytest.raises(KeyError), exact_float32():
        assert allowed() == [False, False]
        raise KeyError
    assert allowed() == before


def test_a_lent_component_computes_so(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []
    encode = type(FAMILY).encode

    def watched(*args: object, **options: object) -> object:
        seen.append(allowed())
        return encode(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(FAMILY), "encode", watched)
    lowvram.encode("a cat", str(tiny), output=tmp_path / "x.embeds.safetensors")
    assert seen[-1] == [False, False]  # before, for the plan, nothing is computed
