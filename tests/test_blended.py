"""Diffusers' tiling, with its sizes set and its tiles counted."""

import logging
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

import lowvram
from lowvram import errors
from lowvram.families.pixart import FAMILY
from lowvram.pixels.blended import BlendedDecode
from lowvram.pixels.png import read_record

CPU = torch.device("cpu")


@pytest.mark.parametrize("sample_size", [128, 1024])
def test_the_tiles_that_are_logged_are_decoded(
    sample_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**FAMILY.tiny_configs["vae"], "sample_size": sample_size}
    vae, seen = AutoencoderKL.from_config(config).eval(), []
    vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-2:]))
    latents = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    caplog.set_level(logging.INFO, "lowvram")
    with torch.inference_mode():
        told: list[tuple[int, int]] = []
        pixels = BlendedDecode(64, 0.25).decode(
            vae, latents, CPU, lambda done, total: told.append((done, total))
        )
        whole = vae.decode(latents).sample
    assert pixels.shape == whole.shape == (1, 3, 128, 192)
    assert not torch.equal(pixels, whole)
    assert "blended: 4 x 3 tiles of 64 px" in caplog.text
    assert len(seen) == 12 + 1 and seen[0] == (8, 8)
    assert told == [(done, 12) for done in range(1, 13)]
    assert not vae.use_tiling  # as it was


def test_one_tile_is_refused() -> None:
    vae = AutoencoderKL.from_config(FAMILY.tiny_configs["vae"]).eval()
    latents = torch.zeros(1, 4, 8, 8)
    with pytest.raises(errors.RequestError, match="64x64 px fits into one tile of 64 px"):
        BlendedDecode(64, 0.25).decode(vae, latents, CPU, lambda done, total: None)


@pytest.mark.parametrize("sample_size", [128, 1024])
def test_encode_in_tiles(sample_size: int) -> None:
    config = {**FAMILY.tiny_configs["vae"], "sample_size": sample_size}
    vae = AutoencoderKL.from_config(config).eval().requires_grad_(False)
    pixels = torch.rand(2, 3, 128, 192, generator=torch.Generator().manual_seed(0)) * 2 - 1
    told: list[tuple[int, int]] = []
    found = BlendedDecode(64, 0.25).encode(
        vae, pixels, CPU, lambda done, total: told.append((done, total))
    )
    whole = vae.encode(pixels).latent_dist.parameters
    assert found.shape == whole.shape and not torch.equal(found, whole)
    assert told == [(done, 12) for done in range(1, 13)]


def test_tiles_that_diffusers_would_round_are_refused() -> None:
    vae = AutoencoderKL.from_config(FAMILY.tiny_configs["vae"]).eval()
    latents = torch.zeros(1, 4, 16, 16)
    for tile, overlap in ((60, 0.25), (64, 0.3), (64, 1.0)):
        with pytest.raises(errors.RequestError, match="not whole cells of 8 px"):
            BlendedDecode(tile, overlap).decode(vae, latents, CPU, lambda done, total: None)
        assert not vae.use_tiling


def test_through_the_stage(tiny: Path, tmp_path: Path) -> None:
    run = lowvram.run("a cat", str(tiny), tmp_path / "x.png", steps=1, in_process=True)
    for pixels in ("whole", "strips", "blended"):
        made = lowvram.decode(
            run.images[0].latents, output=tmp_path / f"{pixels}.png", decode=pixels
        )
        assert read_record(made.paths[0])["decode"]["strategy"] == pixels
        assert made.report.weights == pixels
