"""Sizes: bins as diffusers', latents that fit, and pictures of exactly the size asked for."""

import re
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import lowvram
from lowvram.bins import bins
from lowvram.cli.words import parse_seeds, parse_size
from lowvram.errors import RequestError
from lowvram.families import all_families
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


@pytest.mark.parametrize("cells", TABLES)
def test_tables_are_those_of_diffusers(cells: int) -> None:
    theirs = {float(ratio): (int(h), int(w)) for ratio, (h, w) in TABLES[cells].items()}
    assert bins(cells) == theirs
    assert list(bins(cells)) == list(theirs)  # of two as near, the first counts


WITH_TABLES = [family for family in all_families().values() if family.name.startswith("pixart")]


@pytest.mark.parametrize("family", WITH_TABLES, ids=lambda family: family.name)
def test_every_published_size_has_its_table(family: Any) -> None:
    for cells in TABLES:
        given = {"transformer": {**XL_2, "sample_size": cells}, "vae": family.tiny_configs["vae"]}
        rendered = family.render_size(given, Size(1000, 250), True)[1]
        assert (rendered.width, rendered.height) == (cells * 16, cells * 4)


def test_default_size_and_no_bins() -> None:
    assert FAMILY.render_size(configs(128), None, True)[1] == Size(1024, 1024)
    assert FAMILY.render_size(configs(16), None, True) == (Size(128, 128), Size(128, 128))
    assert FAMILY.render_size(configs(16), Size(100, 193), True)[1] == Size(112, 208)  # no table
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


def test_every_size_is_covered_and_as_diffusers_scales_it() -> None:
    """All widths from 256 to 4096 px with every 97th height, each for its bin of each table."""
    widths = np.arange(256, 4097)
    wrong_there = 0
    for cells, table in TABLES.items():
        bins = np.array([(w, h) for h, w in table.values()])
        limits = [float(ratio) for ratio in table]
        limits = [(low + high) / 2 for low, high in pairwise(limits)]
        for to_height in range(256, 4097, 97):
            width, height = bins[np.searchsorted(limits, to_height / widths)].T.tolist()
            found = np.array([*map(cover_size, width, height, widths.tolist(), repeat(to_height))])
            ratio = np.maximum(to_height / np.array(height), widths / np.array(width))
            theirs = np.stack([np.array(width) * ratio, np.array(height) * ratio], 1).astype(int)
            right = (theirs >= np.stack([widths, np.full_like(widths, to_height)], 1)).all(1)
            assert (found[right] == theirs[right]).all(), cells
            assert (found[:, 0] >= widths).all() and (found[:, 1] >= to_height).all()
            assert (found - theirs).max() <= 1
            wrong_there += int((~right).sum())
    assert 0.015 < wrong_there / (4 * len(widths) * len(range(256, 4097, 97))) < 0.03


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(sorted(TABLES)),
    st.integers(256, 4096),
    st.integers(256, 4096),
)
def test_pixels_of_any_size(cells: int, width: int, height: int) -> None:
    """One channel of a gradient: nothing is shifted, and the size is what was asked for."""
    rendered = FAMILY.render_size(configs(cells), Size(width, height), True)[1]
    down = torch.linspace(-1, 1, rendered.height)[:, None]
    across = torch.linspace(-1, 1, rendered.width)[None, :]
    for pixels in (down.expand(-1, rendered.width), across.expand(rendered.height, -1)):
        found = fit(pixels[None, None], width, height)
        assert found.shape == (1, 1, height, width)
        assert abs(float(found.mean())) < 3 / min(rendered.width, rendered.height, width, height)
        theirs = PixArtImageProcessor.resize_and_crop_tensor(pixels[None, None], width, height)
        assert torch.equal(found, theirs) or theirs.shape[-1] == 1 or theirs.shape[-2] == 1


@pytest.mark.parametrize(
    ("cells", "asked", "binning", "said"),
    [
        (128, (4096, 4096), False, "4096x4096 is more than any published .* no 4K checkpoint"),
        (256, (4096, 4096), False, "4096x4096 is more than any published"),
        (256, (4096, 4096), True, "4096x4096 will be scaled up from 2048x2048"),
        (64, (1024, 1024), False, r"1024x1024 is more than this model was .* \(512x512\)"),
        (256, (4096, 1024), True, ""),
        (128, None, True, ""),
        (128, (1000, 1300), True, ""),
        (32, (256, 256), False, ""),
    ],
)
def test_what_is_said_of_a_size(
    cells: int, asked: tuple[int, int] | None, binning: bool, said: str
) -> None:
    given = configs(cells)
    requested, rendered = FAMILY.render_size(given, asked and Size(*asked), binning)
    note = FAMILY.size_note("", given, requested, rendered)
    assert re.match(said, note) if said else note == ""


def test_the_note_is_logged_and_a_run_has_the_size_asked_for(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = lowvram.run(
        "a cat", str(tiny), tmp_path / "x.png", size=(641, 481), steps=1, in_process=True
    )
    assert "641x481 will be scaled up from 288x224" in caplog.text
    with Image.open(result.images[0].path) as picture:
        assert picture.size == (641, 481)


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
