"""What a run may be asked for is what its stages may be asked for."""

from pathlib import Path
from typing import get_type_hints

import pytest

import lowvram
from lowvram.request.decode import DecodeOptions
from lowvram.request.denoise import DenoiseOptions
from lowvram.request.encode import EncodeOptions
from lowvram.request.encode_image import EncodeImageOptions
from lowvram.request.run import RunOptions


def test_a_run_takes_the_options_of_its_stages() -> None:
    stages = {**get_type_hints(EncodeOptions), **get_type_hints(DenoiseOptions)}
    stages |= get_type_hints(DecodeOptions)
    kind = stages.pop("weights")
    own = {"encoder_weights": kind, "transformer_weights": kind, "image": str | Path | None}
    own |= {"refine": bool, "refine_strength": float | None, "refiner": str}
    image = get_type_hints(EncodeImageOptions)
    assert image.pop("encode") is str  # `decode` says it for both
    assert stages | image | own == get_type_hints(RunOptions)


def test_an_option_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="guidance"):
        lowvram.run("a cat", "demo", tmp_path, guidance=3)  # type: ignore[call-arg]
