"""Each stage runs with its own component only, and gives it back."""

import shutil
import weakref
from pathlib import Path

import pytest
import torch

import lowvram
from lowvram import component, errors
from lowvram.memory.meter import Meter
from lowvram.memory.plan import Room
from lowvram.weights.checkpoint import Loaded
from lowvram.weights.whole import Whole


def keep_weights_of(role: str, tiny: Path, folder: Path) -> str:
    """A copy of the tiny checkpoint in which only that component still has its weights."""
    shutil.copytree(tiny, folder)
    for path in folder.glob("*/*.safetensors"):
        if path.parent.name != role:
            path.unlink()
    return str(folder)


def test_each_stage_needs_its_own_weights_only(tiny: Path, tmp_path: Path) -> None:
    embeds, latents = tmp_path / "x.embeds.safetensors", tmp_path / "x.latents.safetensors"
    lone = keep_weights_of("text_encoder", tiny, tmp_path / "encoder")
    lowvram.encode("a red circle", lone, output=embeds)
    with pytest.raises(
        errors.ModelError,
        match=r"has no model\.safetensors or diffusion_pytorch_model\.safetensors",
    ):
        lowvram.denoise(embeds, output=latents)

    whole = tmp_path / "whole.embeds.safetensors"
    lowvram.encode("a red circle", str(tiny), output=whole)
    removed = [path for path in tiny.glob("*/*.safetensors")]
    for role, stage in (
        ("transformer", lambda: lowvram.denoise(whole, output=latents, steps=1)),
        ("vae", lambda: lowvram.decode(latents, output=tmp_path / "x.png")),
    ):
        away = [path for path in removed if path.parent.name != role]
        for path in away:
            path.rename(path.with_suffix(".away"))
        try:
            stage()
        finally:
            for path in away:
                path.with_suffix(".away").rename(path)


def test_release_leaves_nothing_and_names_what_stays(tiny: Path) -> None:
    kept: list[torch.Tensor] = []

    def lend(work: "component.Callable[[Loaded], object]") -> component.Used[object]:
        cpu = torch.device("cpu")
        name, folder = "diffusers.AutoencoderKL", tiny / "vae"
        return component.use(name, folder, Whole(torch.float32), cpu, Meter(cpu), Room(0), work)

    used = lend(lambda vae: sum(p.numel() for p in vae.model.parameters()))
    assert used.left_behind == []
    assert used.weights_bytes >= 4 * used.result > 0

    leaked = lend(lambda vae: kept.append(vae.model.decoder.conv_in.weight))
    assert leaked.left_behind == ["decoder.conv_in.weight"]


def test_an_error_that_is_kept_keeps_no_weights(tiny: Path) -> None:
    cpu, watched = torch.device("cpu"), []

    def fail(vae: Loaded) -> None:
        watched.append(weakref.ref(vae.model.decoder.conv_in.weight))
        raise MemoryError

    with pytest.raises(MemoryError) as kept:
        component.use(
            "diffusers.AutoencoderKL",
            tiny / "vae",
            Whole(torch.float32),
            cpu,
            Meter(cpu),
            Room(0),
            fail,
        )
    assert kept.value.__traceback__ is not None
    assert watched[0]() is None


def test_reports_count_time_and_memory(tiny: Path, tmp_path: Path) -> None:
    result = lowvram.run("a red circle", str(tiny), tmp_path, steps=2, in_process=True)
    assert [stage["stage"] for stage in result.stages] == ["encode", "denoise", "decode"]
    for stage in result.stages:
        assert stage["peak_rss_bytes"] > 50e6
        assert 0 < stage["load_seconds"] + stage["compute_seconds"] <= stage["seconds"]
        assert stage["left_behind"] == []
        if not torch.cuda.is_available():
            assert stage["peak_allocated_bytes"] is None
    assert result.report.exists()
    for word in ("stage", "load", "compute", "RSS", "encode", "bfloat16"):
        assert word in result.table()


def test_progress_counts_pictures_for_people(tiny: Path, tmp_path: Path) -> None:
    """The bar moves by hundredths; no stage's last word stays while the next one begins."""
    told: list[lowvram.Progress] = []
    options = {"steps": 1, "in_process": True, "seed": [1, 2], "decode": "strips"}
    lowvram.run("a cat", str(tiny), tmp_path / "x.png", on_progress=told.append, **options)
    decoding = [each for each in told if each.doing == "decoding"]
    assert decoding[-1].counted() == "2/2" and decoding[-1].total == 200
    assert {each.counted() for each in decoding} == {"0/2", "1/2", "2/2"}
    assert next(each for each in told if each.stage == "denoise").counted() == ""
    assert [each.stage for each in told if each.doing == "reading the embeddings"] == ["denoise"]


@pytest.mark.parametrize("stage", ["denoise", "decode"])
def test_nan_is_an_error_and_no_picture(
    stage: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKL, PixArtTransformer2DModel

    broken = PixArtTransformer2DModel if stage == "denoise" else AutoencoderKL
    load = broken.from_pretrained

    def poisoned(*args: object, **kwargs: object) -> object:
        model, info = load(*args, **kwargs)
        with torch.no_grad():
            next(reversed(list(model.parameters())))[:] = float("nan")
        return model, info

    monkeypatch.setattr(broken, "from_pretrained", poisoned)
    ways_out = {"denoise": "try another --guidance", "decode": "check the files of the VAE"}
    with pytest.raises(errors.NonFiniteError, match=ways_out[stage]):  # both are float32 already
        lowvram.run("a red circle", str(tiny), tmp_path / "x.png", steps=1, in_process=True)
    assert (tmp_path / "x.embeds.safetensors").exists()
    assert (tmp_path / "x.latents.safetensors").exists() == (stage == "decode")
    assert not (tmp_path / "x.png").exists()
