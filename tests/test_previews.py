"""Previews are what the VAE would show, and need it once only."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lowvram
from lowvram import errors
from lowvram.repository import resolve
from lowvram.stages import previews
from lowvram.stages.previews import Colours, _read

PROMPTS = [
    "a large blue star on a yellow background",
    "a small red heart on a green background",
    "a white circle on a black background",
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty, of this test only."""
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("previews") / "x.embeds.safetensors"
    lowvram.encode(PROMPTS, "demo", output=path)
    return path


@pytest.mark.parametrize("scheduler", ["", "euler", "heun", "ddim"])
def test_they_show_the_picture_from_the_first_step_on(
    scheduler: str, demo: Path, tmp_path: Path
) -> None:
    latents, shown = tmp_path / "x.latents.safetensors", []
    lowvram.denoise(
        demo,
        output=latents,
        seed=1,
        batch_size=3,
        scheduler=scheduler,
        preview=4,
        on_preview=lambda step, levels: shown.append((step, levels)),
    )
    decoded = lowvram.decode(latents, output=tmp_path / "x.png")
    pictures = np.stack([np.asarray(Image.open(each).convert("RGB")) for each in decoded.paths])
    means = pictures.reshape(3, 16, 8, 16, 8, 3).mean((2, 4))
    calls = 39 if scheduler == "heun" else 20
    last = [] if calls % 4 == 0 else [calls - 1]
    assert [step for step, _ in shown] == [*range(3, calls, 4), *last]
    for step, levels in shown:
        assert levels.shape == (3, 16, 16, 3)
        alike = np.corrcoef(levels.ravel(), means.ravel())[0, 1]
        print(scheduler, step, round(float(alike), 4))
        assert alike > 0.95
    with Image.open(tmp_path / "x.preview.png") as written:
        assert written.size == (3 * 256, 256)
        small = np.asarray(written.resize((48, 16), Image.Resampling.BOX)).astype(float)
    assert np.abs(small - np.concatenate(list(shown[-1][1]), axis=1)).mean() < 4


def test_latents_are_the_same_with_and_without(demo: Path, tmp_path: Path) -> None:
    made = []
    for name, options in {"with": {"preview": 1}, "without": {}}.items():
        path = tmp_path / f"{name}.latents.safetensors"
        lowvram.denoise(demo, output=path, steps=3, **options)
        made.append(path.read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize(("scheduler", "steps"), [("", [3, 5]), ("heun", [3, 7, 8])])
def test_from_a_start_the_last_is_the_picture_too(
    scheduler: str, steps: list[int], demo: Path, tmp_path: Path
) -> None:
    start, latents = (tmp_path / f"{name}.latents.safetensors" for name in "ab")
    lowvram.denoise(demo, output=start, steps=2, batch_size=3)
    shown: list[tuple[int, np.ndarray]] = []
    lowvram.denoise(
        demo,
        output=latents,
        start=start,
        strength=0.6,
        steps=9 if scheduler else 10,
        batch_size=3,
        scheduler=scheduler,
        preview=4,
        on_preview=lambda step, levels: shown.append((step, levels)),
    )
    assert [step for step, _ in shown] == steps


def test_the_vae_is_read_once_before_the_transformer(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeds, told = tmp_path / "x.embeds.safetensors", []
    lowvram.encode("a cat", str(tiny), output=embeds)

    def denoise() -> list[str]:
        told.clear()
        lowvram.denoise(
            embeds,
            output=tmp_path / "x.latents.safetensors",
            steps=2,
            preview=1,
            on_progress=lambda each: told.append(each.doing),
        )
        return list(dict.fromkeys(told))

    fitting = "fitting preview colours from the VAE"
    reading = "reading the embeddings"
    assert denoise() == [reading, fitting, "loading the transformer", "denoising"]
    assert denoise() == [reading, "loading the transformer", "denoising"]
    [kept] = (cache / "previews").iterdir()
    kept.write_text('{"weights": [[1, 2, NaN]]}')  # damaged: made again
    assert denoise()[1] == fitting


def test_a_cache_that_cannot_be_written_costs_time_only(
    tiny: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("no folder")
    embeds, latents = tmp_path / "x.embeds.safetensors", tmp_path / "x.latents.safetensors"
    lowvram.encode("a cat", str(tiny), output=embeds, cache=False)
    caplog.set_level("INFO")
    lowvram.denoise(embeds, output=latents, steps=1, preview=1)
    assert (tmp_path / "x.preview.png").is_file()
    assert "cannot be written: the next previews fit their colours again" in caplog.text
    assert "kept in" not in caplog.text


def test_without_the_vae_it_says_so(tiny: Path, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    for path in (folder / "vae").glob("*.safetensors"):
        path.unlink()
    embeds, latents = tmp_path / "x.embeds.safetensors", tmp_path / "x.latents.safetensors"
    lowvram.encode("a cat", str(folder), output=embeds)
    with pytest.raises(errors.ModelError, match=r"previews need the VAE, once: .*or leave out"):
        lowvram.denoise(embeds, output=latents, steps=1, preview=1)
    with pytest.raises(errors.RequestError, match="never called without preview"):
        lowvram.denoise(embeds, output=latents, steps=1, on_preview=lambda step, levels: None)
    assert not latents.exists()


def test_the_fit_is_the_best_linear_map(cache: Path) -> None:
    """No worse on made-up pictures than any other map: its residual is orthogonal to latents."""
    from diffusers import AutoencoderKL
    from torch.nn.functional import avg_pool2d

    vae = AutoencoderKL.from_pretrained(resolve("demo").fetch("vae")).eval()
    with torch.inference_mode():
        colours = previews.fit(vae)
        latents = vae.encode(previews._made_up_pictures()).latent_dist.mean
        means = avg_pool2d(vae.decode(latents).sample.clamp(-1, 1), 8)
    weights = torch.tensor(colours.weights)
    left = means.movedim(1, -1) - (latents.movedim(1, -1) @ weights[:-1] + weights[-1])
    assert left.abs().mean() < 0.2
    assert left.mean().abs() < 1e-3
    assert (latents.movedim(1, -1).flatten(0, 2).T @ left.flatten(0, 2)).abs().max() < 0.2


def test_a_map_of_another_kind_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"weights": [[1, 2, 3], [4, 5, 6]]}')
    assert _read(path, 1) == Colours(((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)))
    assert _read(path, 4) is None
    for text in ("", "{}", '{"weights": 3}', '{"weights": [[1, 2], [3, 4]]}'):
        path.write_text(text)
        assert _read(path, 1) is None
