"""A picture becomes latents: whatever its file is, as diffusers has it, and back by decode."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageCms
from safetensors.torch import load_file

import lowvram
from lowvram import artifacts, cli, errors
from lowvram.families.family import Size
from lowvram.families.pixart import FAMILY
from lowvram.memory.plan import Room
from lowvram.pixels.picture import pixels_of, read_picture, read_size
from lowvram.pixels.png import read_record
from lowvram.repository import resolve
from lowvram.stages.options.pixels import pixels_options

CONFIGS = {role: FAMILY.published_configs[role] for role in ("transformer", "vae", "scheduler")}
PROMPT = "a large blue star on a yellow background"


@pytest.fixture(scope="module")
def star(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of the demo model, 128 x 128 px."""
    path = tmp_path_factory.mktemp("star") / "star.png"
    lowvram.run(PROMPT, "demo", path, seed=3, steps=10, in_process=True)
    return path


def vae_of(model: str) -> AutoencoderKL:
    folder = resolve(model).sources["vae"].folder / "vae"
    return AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)


def noisy(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture with something in every pixel."""
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    values = np.random.default_rng(0).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(values, mode)


@pytest.mark.parametrize("model", ["demo", "tiny"])
@pytest.mark.parametrize("seed", [None, 5])
def test_equals_diffusers(model: str, seed: int | None, tiny: Path, tmp_path: Path) -> None:
    """Bit for bit in fp32 on the CPU: preprocessing, VAE, posterior, scaling.

    diffusers hands its VAE a tensor whose channels come last in memory, by which a CPU sums in
    another order than usual, and so is ours; the usual order is within 1e-5 of that.
    """
    name, side = (str(tiny), 256) if model == "tiny" else ("demo", 128)
    picture, latents = tmp_path / "x.png", tmp_path / "x.latents.safetensors"
    noisy(300, 300).save(picture)
    lowvram.encode_image(picture, name, output=latents, sample_seed=seed, device="cpu")
    vae = vae_of(name)
    pixels = VaeImageProcessor().preprocess(Image.open(picture), height=side, width=side)
    found = load_file(latents)["latents"]
    for given in (pixels.contiguous(), pixels):
        encoded = vae.encode(given).latent_dist
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        expected = encoded.mode() if seed is None else encoded.sample(generator)
        expected = vae.config.scaling_factor * expected
        assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    assert torch.equal(found, expected)


def test_decode_gives_the_picture_back(star: Path, tmp_path: Path) -> None:
    latents, back = tmp_path / "x.latents.safetensors", tmp_path / "back.png"
    result = lowvram.encode_image(star, "demo", output=latents)
    assert (result.items[0]["width"], result.items[0]["height"]) == (128, 128)
    assert result.report.stage == "encode-image" and result.report.left_behind == []
    lowvram.decode(latents, output=back)
    levels = [np.asarray(Image.open(path)).astype(float) for path in (star, back)]
    error = ((levels[0] - levels[1]) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 28  # dB; 31.8 measured
    record = read_record(back)
    assert record["encode-image"]["requested"] == [128, 128] and "denoise" not in record
    assert record["prompt"] == "" and len(record["picture_sha256"]) == 64


def test_strips_are_the_same_and_keep_their_budget(star: Path, tmp_path: Path) -> None:
    """The budget is held by counting every tensor; whole needs 5.8 MB here."""
    paths = [tmp_path / f"{way}.latents.safetensors" for way in ("whole", "strips")]
    lowvram.encode_image(star, "demo", output=paths[0])
    result = lowvram.encode_image(star, "demo", output=paths[1], stage_budget=4 << 20)
    assert result.report.weights == "strips"
    assert "whole needs" in result.report.reasons[0]
    foretold = result.report.predicted["peak_allocated_bytes"]
    assert 0.9 * foretold <= result.report.peak_allocated_bytes <= foretold
    whole, strips = (load_file(path)["latents"] for path in paths)
    assert (whole - strips).abs().max() <= 1e-5 * max(1, whole.abs().max())
    with pytest.raises(errors.RequestError, match=r"encode-image with whole .*--encode strips"):
        lowvram.encode_image(star, "demo", output=paths[1], encode="whole", stage_budget=4 << 20)


def test_foretold_of_the_true_vae(true_sizes: Path) -> None:
    """Strips take a small part of whole, on a card too, and only half of the VAE is counted."""
    model, cuda = resolve(str(true_sizes)), torch.device("cuda")
    for direction in ("encode", "decode"):
        ways = pixels_options(
            model, "auto", torch.float16, cuda, Room(0), (1, 4, 128, 128), 1, None, direction
        )
        needs = {way.name: way.need for way in ways}
        assert needs["strips"].allocated < 0.2 * needs["whole"].allocated
        assert 30e6 < needs["strips"].allocated < 300e6
        assert 1e12 < needs["whole"].flops < 2e13


def read(image: Image.Image, kind: str, path: Path, **settings: Any) -> Image.Image:
    image.save(path, kind, **settings)
    return read_picture(path, path.read_bytes())


def test_alpha_lies_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))  # hidden red, as editors leave it
    clear.putpixel((0, 0), (0, 0, 255, 255))
    clear.putpixel((1, 0), (0, 0, 0, 51))
    found = read(clear, "PNG", tmp_path / "x.png")
    assert [found.getpixel(at) for at in ((0, 0), (1, 0), (3, 1))] == [
        (0, 0, 255),
        (204, 204, 204),
        (255, 255, 255),
    ]
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([9, 9, 9, 200, 100, 50])
    assert read(palette, "PNG", tmp_path / "x.png").getpixel((0, 0)) == (200, 100, 50)
    found = read(palette, "PNG", tmp_path / "x.png", transparency=1)
    assert found.getpixel((0, 0)) == (255, 255, 255)


def test_16_bit_greys_keep_their_range(tmp_path: Path) -> None:
    deep = Image.fromarray(np.array([[0, 257 * 100, 257 * 200 + 120, 65535]], dtype=np.uint16))
    found = read(deep, "PNG", tmp_path / "x.png")
    assert [found.getpixel((x, 0)) for x in range(4)] == [(v,) * 3 for v in (0, 100, 200, 255)]
    found = read(noisy(4, 4, "L"), "PNG", tmp_path / "x.png")
    assert found.mode == "RGB"


def test_cmyk_is_read_in_its_colours(tmp_path: Path) -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    red, green, blue = read(cyan, "JPEG", tmp_path / "x.jpg", quality=100).getpixel((8, 8))
    assert red < 16 and green > 240 and blue > 240


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation: int, tmp_path: Path) -> None:
    image, path = Image.new("RGB", (6, 4)), tmp_path / "x.png"
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = read(image, "PNG", path, exif=exif)
    assert found.size == read_size(path) == ((4, 6) if orientation >= 5 else (6, 4))
    corners = {
        1: (0, 0), 2: (5, 0), 3: (5, 3), 4: (0, 3), 5: (0, 0), 6: (3, 0), 7: (3, 5), 8: (0, 5),
    }  # fmt: skip
    assert found.getpixel(corners[orientation]) == (255, 255, 255)


def test_profiles_are_applied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = Image.new("RGB", (2, 2), (200, 100, 50))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert read(plain, "PNG", tmp_path / "x.png", icc_profile=srgb).getpixel((0, 0)) == (
        200,
        100,
        50,
    )
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # not of RGB pixels
    found = read(plain, "PNG", tmp_path / "x.png", icc_profile=lab)
    assert found.getpixel((0, 0)) == (200, 100, 50)
    found = read(plain, "PNG", tmp_path / "x.png", icc_profile=b"nonsense" * 20)
    assert found.getpixel((0, 0)) == (200, 100, 50)
    assert caplog.text.count("colour profile") == 2


def test_cut_and_never_distorted() -> None:
    """A circle in a wide picture stays a circle; a picture of the aspect is diffusers' own."""
    wide = Image.new("RGB", (300, 100), "white")
    circle = np.asarray(wide).copy()
    y, x = np.mgrid[:100, :300]
    circle[(x - 149.5) ** 2 + (y - 49.5) ** 2 < 30**2] = 0
    found = pixels_of(Image.fromarray(circle), (200, 200), torch.float32)
    dark = found[0, 0] < 0
    rows, columns = dark.any(1).sum(), dark.any(0).sum()
    assert abs(int(rows) - int(columns)) <= 1 and 118 <= int(rows) <= 122
    for size in ((64, 32), (160, 80), (400, 200)):
        same = noisy(200, 100)
        expected = VaeImageProcessor().preprocess(same, height=size[1], width=size[0])
        assert torch.equal(pixels_of(same, size, torch.float32), expected)


@pytest.mark.parametrize("width", [1, 7, 999, 4000])
@pytest.mark.parametrize("height", [1, 1000, 3001])
def test_any_size_fits(width: int, height: int) -> None:
    if width * height > 4e6:
        width, height = width // 4, height // 4
    found = pixels_of(Image.new("RGB", (width, height)), (96, 64), torch.float16)
    assert found.shape == (1, 3, 64, 96) and found.dtype == torch.float16


def test_the_size_without_a_size() -> None:
    """The bin nearest to the picture's aspect, and for models without bins the model's area."""
    assert FAMILY.size_like(CONFIGS, Size(4000, 3000), True) == Size(1152, 832)
    assert FAMILY.size_like(CONFIGS, Size(40, 40), True) == Size(1024, 1024)
    for picture in (Size(4000, 3000), Size(50, 1000), Size(3, 4)):
        made = FAMILY.size_like(CONFIGS, picture, True)
        assert FAMILY.render_size(CONFIGS, made, True) == (made, made)
        made = FAMILY.size_like(CONFIGS, picture, False)
        assert FAMILY.render_size(CONFIGS, made, False) == (made, made)
        assert 0.9 < made.width * made.height / 1024**2 < 1.1
        assert abs(made.width / made.height / (picture.width / picture.height) - 1) < 0.05


def test_several_pictures_and_the_size_asked(tiny: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
    noisy(300, 200).save(paths[0])
    noisy(90, 200, "L").save(paths[1])
    latents = tmp_path / "x.latents.safetensors"
    result = lowvram.encode_image(paths, str(tiny), output=latents, size=(300, 200))
    header, tensors = artifacts.read(latents, "latents")
    assert [item["picture_size"] for item in result.items] == [[300, 200], [90, 200]]
    assert (header.settings["requested"], header.settings["rendered"]) == ([300, 200], [304, 208])
    assert tensors["latents"].shape == (2, 4, 26, 38)
    pictures = lowvram.decode(latents, output=tmp_path / "y.png").paths
    assert [read_size(path) for path in pictures] == [(300, 200)] * 2


def test_same_bytes_again_and_the_header_says_what_changed_them(star: Path, tmp_path: Path) -> None:
    def made(**options: Any) -> artifacts.Header:
        path = tmp_path / "x.latents.safetensors"
        lowvram.encode_image(star, "demo", output=path, **options)
        return artifacts.read_header(path)

    first = made()
    assert made().key == first.key
    assert made(sample_seed=1).key != made(sample_seed=2).key != first.key
    damaged = tmp_path / "x.latents.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    with pytest.raises(errors.ArtifactError, match="make it again with lowvram encode-image"):
        lowvram.decode(damaged, output=tmp_path / "y.png")


def broken(kind: str) -> Callable[[Path], Any]:
    """Writes a picture that cannot be used."""
    png = io.BytesIO()
    noisy(64, 64).save(png, "PNG")
    return {
        "text": lambda path: path.write_text("no picture"),
        "empty": lambda path: path.write_bytes(b""),
        "cut": lambda path: path.write_bytes(png.getvalue()[:2000]),
        "float": lambda path: Image.new("F", (8, 8)).save(path, "TIFF"),
        "folder": lambda path: path.mkdir(),
        "missing": lambda path: None,
        "huge": lambda path: Image.new("1", (9000, 8000)).save(path, "PNG"),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("text", "cannot be read .* give a PNG"),
        ("empty", "cannot be read"),
        ("cut", "cannot be read"),
        ("float", "floating-point pixels: save it in 8 or 16"),
        ("folder", "cannot be read"),
        ("missing", "does not exist"),
        ("huge", "9000x8000 px: at most"),
    ],
)
def test_bad_pictures_are_one_line(
    kind: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "x.png"
    broken(kind)(picture)
    code = cli.exit_code(["encode-image", str(picture), "-m", "demo"])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("lowvram: picture ")
    assert re.search(says, last), last
    assert not list(tmp_path.glob("*.safetensors"))


def test_default_names_replace_neither_the_picture_nor_what_a_run_left_beside_it(
    star: Path, tmp_path: Path
) -> None:
    picture, latents = tmp_path / "x.png", tmp_path / "x.latents.safetensors"
    picture.write_bytes(star.read_bytes())
    latents.write_bytes(b"of a run")
    assert cli.exit_code(["encode-image", str(picture), "-m", "demo"]) == 0
    assert cli.exit_code(["decode", str(tmp_path / "x.image.latents.safetensors")]) == 0
    assert picture.read_bytes() == star.read_bytes()
    assert latents.read_bytes() == b"of a run"
    assert (tmp_path / "x.image.png").is_file()


def test_latents_are_told_from_embeddings_and_checkpoints(
    star: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = tmp_path / "x.latents.safetensors"
    lowvram.encode_image(star, "demo", output=latents)
    assert cli.exit_code(["encode", "a star", "-m", "demo", "--embeds", str(latents)]) == 2
    assert "holds latents that lowvram made: lowvram decode it" in capsys.readouterr().err
    with pytest.raises(errors.ArtifactError, match="holds latents, but a checkpoint is needed: de"):
        artifacts.read_header(latents, "checkpoint")


def test_command_prints_json(
    star: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = tmp_path / "x.latents.safetensors"
    command = ["encode-image", str(star), "-m", "demo", "-o", str(latents), "--json"]
    assert cli.exit_code(command) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["images"][0]["latents"] == document["latents"] == str(latents)
    assert document["stages"][0]["stage"] == "encode-image"
