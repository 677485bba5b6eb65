"""Sizes: bins as diffusers', latents that fit, and pictures of exactly the size asked for."""

import pytest
import torch
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram.cli.options import parse_seeds, parse_size
from lowvram.errors import RequestError
from lowvram.families.family import Config, Size
from lowvram.families.pixart import FAMILY, SDXL_VAE, XL_2
from lowvram.pixels.fit import cover_size, fit

TABLES = {
    32: pipeline_pixart_alpha.ASPECT_RATIO_256_BIN,
    64: pipeline_pixart_alpha.ASPECT_RATIO_512_BIN,
    128: pipeline_pixart_alpha.ASPECT_RATIO_1024_BIN,
    256: pipeline_pixart_sigma.ASPECT_RATIO_2048_BIN,
}
SIDES = st.integers(16, 8192)


def configs(cells: int) -> dict[str, Config]:
    return {"transformer": {**XL_2, "sample_size": cells}, "vae": SDXL_VAE}


@settings(deadline=None)
@given(cells=st.sampled_from(sorted(TABLES)), width=SIDES, height=SIDES)
def test_bins_are_those_of_diffusers(cells: int, width: int, height: int) -> None:
    expected = PixArtImageProcessor.classify_height_width_bin(height, width, TABLES[cells])
    asked, rendered = FAMILY.render_size(configs(cells), Size(width, height), True)
    assert asked == Size(width, height)
    assert (rendered.height, rendered.width) == expected
    shape = FAMILY.latent_shape(configs(cells), rendered)
    assert shape == (4, rendered.height // 8, rendered.width // 8)
    assert shape[1] % 2 == shape[2] % 2 == 0


def test_default_size_and_no_bins() -> None:
    assert FAMILY.render_size(configs(128), None, True)[1] == Size(1024, 1024)
    assert FAMILY.render_size(configs(16), None, True) == (Size(128, 128), Size(128, 128))
    assert FAMILY.render_size(configs(64), Size(528, 16), False)[1] == Size(528, 16)
    with pytest.raises(RequestError, match=r"not a multiple of 16 px.*use 512x304"):
        FAMILY.render_size(configs(64), Size(512, 300), False)
    for size in (Size(8, 512), Size(512, 9000)):
        with pytest.raises(RequestError, match="out of range"):
            FAMILY.render_size(configs(64), size, True)


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 4096))
def test_cover_size_just_covers(width: int, height: int, to_width: int, to_height: int) -> None:
    found = cover_size(width, height, to_width, to_height)
    assert found[0] >= to_width and found[1] >= to_height
    assert found[0] == to_width or found[1] == to_height


def test_every_size_comes_out_right_and_as_diffusers_where_it_is_right() -> None:
    """For sides from 16 to 496 px of a 256 px model, beside diffusers' own function."""
    sides = range(16, 513, 48)
    sizes = [(32, Size(width, height)) for width in sides for height in sides]
    wrong_there = []
    for cells, size in [*sizes, (32, Size(320, 240)), (64, Size(176, 464))]:
        rendered = FAMILY.render_size(configs(cells), size, True)[1]
        pixels = torch.rand(1, 1, rendered.height, rendered.width)
        ours = fit(pixels, size.width, size.height)
        assert ours.shape == (1, 1, size.height, size.width)
        theirs = PixArtImageProcessor.resize_and_crop_tensor(pixels, size.width, size.height)
        if theirs.shape == ours.shape:
            assert torch.equal(ours, theirs)
        else:
            wrong_there.append(size)
    assert wrong_there == [Size(320, 240), Size(176, 464)]  # else this is not needed any more


@given(SIDES, SIDES)
def test_sizes_parse(width: int, height: int) -> None:
    assert parse_size(f"{width}x{height}") == Size(width, height)
    assert parse_size(f" {width} X {height} ") == Size(width, height)


@pytest.mark.parametrize("text", ["", "512", "x512", "512x", "-5x5", "5.5x5", "512x512x3", "axb"])
def test_odd_sizes_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="WIDTHxHEIGHT"):
        parse_size(text)


def test_seeds_parse() -> None:
    assert parse_seeds("7") == 7
    assert parse_seeds("1, 2,5") == [1, 2, 5]
    assert parse_seeds("3-6,9") == [3, 4, 5, 6, 9]
    for text in ("", "a", "5-3", "1,,2", "-1", "1.5", "0-99999999"):
        with pytest.raises(RequestError, match="is not a number, list or range"):
            parse_seeds(text)
