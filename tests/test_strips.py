"""Strips give the pixels of the whole decode, in the room they are given, and leave nothing."""

import errno
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from lowvram import errors
from lowvram.families.pixart import FAMILY
from lowvram.memory.count import LiveBytes, fake_device
from lowvram.pixels import feature_maps
from lowvram.pixels.feature_maps import InRam, OnDisk
from lowvram.pixels.strategy import OnWork
from lowvram.pixels.strips import Direction, StripDecode, comfortable_room, least_room
from lowvram.weights.checkpoint import build

CPU = torch.device("cpu")
TINY = FAMILY.tiny_configs["vae"]
KINDS = {
    "SDXL": TINY,
    "16 channels, no quant convs": {
        **TINY, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False,
    },
    "no attention, two layers": {**TINY, "mid_block_add_attention": False, "layers_per_block": 2},
    "no upsampling at the end": {**TINY, "block_out_channels": [16, 32, 8]}
    | {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3},
}  # fmt: skip


def nothing(done: int, total: int) -> None:
    """No one looks."""


def _into(told: list[tuple[int, int]]) -> OnWork:
    return lambda done, total: told.append((done, total))


def make(kind: str) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL.from_config(KINDS[kind]).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(9, 13, 1), (8, 10, 2), (4, 3, 1)], ids=str)
def test_decode_is_the_whole_one(kind: str, size: tuple[int, int, int]) -> None:
    vae, (height, width, batch) = make(kind), size
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = torch.randn(batch, vae.config.latent_channels, height, width)
    expected = vae.decode(latents).sample
    for room in (least_room, comfortable_room):
        told: list[tuple[int, int]] = []
        bytes_ = room(vae, height * scale, width * scale, torch.float32, "cpu")
        found = StripDecode(bytes_, InRam()).decode(vae, latents, CPU, _into(told))
        assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
        assert told[-1][0] == told[-1][1] and len({total for _, total in told}) == 1
        assert told == sorted(told)


@pytest.mark.parametrize("kind", KINDS)
def test_encode_is_the_whole_one(kind: str) -> None:
    vae = make(kind)
    pixels = torch.rand(2, 3, 72, 104) * 2 - 1
    expected = vae.encode(pixels).latent_dist.parameters
    room = least_room(vae, 72, 104, torch.float32, "cpu", "encode")
    found = StripDecode(room, InRam()).encode(vae, pixels, CPU, nothing)
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def test_the_trained_vae_at_a_realistic_input() -> None:
    folder = Path(__file__).parents[1] / "lowvram" / "demo" / "model" / "vae"
    vae = AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)
    stripes = torch.linspace(-1, 1, 128).sign().expand(1, 3, 128, 128).contiguous()
    latents = vae.encode(stripes).latent_dist.mode()
    expected = vae.decode(latents).sample
    room = least_room(vae, 128, 128, torch.float32, "cpu")
    found = StripDecode(room, InRam()).decode(vae, latents, CPU, nothing)
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_further_from_float32_than_the_whole_decode(kind: str, dtype: torch.dtype) -> None:
    vae = make(kind)
    half = make(kind)
    for tensor in half.parameters():
        tensor.data = tensor.data.to(dtype)
    for mine, rounded in zip(vae.parameters(), half.parameters(), strict=True):
        mine.data = rounded.data.float()
    latents = torch.randn(2, vae.config.latent_channels, 12, 12).to(dtype)
    reference = vae.decode(latents.float()).sample
    whole = (half.decode(latents).sample.float() - reference).norm()
    found = StripDecode(1 << 24, InRam()).decode(half, latents, CPU, nothing)
    assert found.dtype == dtype
    # 2 %: the two differ in where sums are split, not in how often they are rounded
    assert (found.float() - reference).norm() <= 1.02 * whole


@pytest.mark.parametrize(
    ("side", "dtype", "direction"),
    [
        (256, torch.float16, "decode"),
        (1024, torch.float16, "decode"),
        (256, torch.float32, "decode"),
        (512, torch.float16, "encode"),
    ],
    ids=str,
)
def test_the_true_vae_keeps_its_room(side: int, dtype: torch.dtype, direction: Direction) -> None:
    with torch.inference_mode(False), fake_device() as device:
        with device:
            vae = build(AutoencoderKL, FAMILY.published_configs["vae"], dtype)
        room = comfortable_room(vae, side, side, dtype, device.type, direction)
        shape = (1, 4, side // 8, side // 8) if direction == "decode" else (1, 3, side, side)
        with torch.inference_mode(), LiveBytes(device.type) as live:
            strips = StripDecode(room, InRam())
            getattr(strips, direction)(vae, torch.empty(shape, dtype=dtype), device, nothing)
        weights = sum(p.numel() * p.element_size() for p in vae.decoder.parameters())
    assert live.peak <= room
    assert weights + room <= 0.17e9 * dtype.itemsize / 2


@pytest.mark.parametrize(("side", "most"), [(2048, 0.4e9), (4096, 1.2e9)], ids=str)
def test_large_pictures_keep_their_budget(side: int, most: float) -> None:
    with torch.inference_mode(False), fake_device() as device:
        with device:
            vae = build(AutoencoderKL, FAMILY.published_configs["vae"], torch.float16)
        with torch.inference_mode(), LiveBytes(device.type) as live:
            for half in (vae.decoder, vae.post_quant_conv):
                for parameter in half.parameters():
                    live.add(parameter)
            latents = torch.empty(1, 4, side // 8, side // 8, dtype=torch.float16)
            room = int(most) - live.now
            StripDecode(room, InRam()).decode(vae, latents, device, nothing)
    assert live.peak <= most
    assert comfortable_room(vae, side, side, torch.float16, "cuda") <= room


def test_on_disk_as_in_ram_and_no_file_stays(tmp_path: Path) -> None:
    vae = make("SDXL")
    latents = torch.randn(1, 4, 9, 13)
    expected = StripDecode(1 << 22, InRam()).decode(vae, latents, CPU, nothing)
    assert torch.equal(
        StripDecode(1 << 22, OnDisk(tmp_path)).decode(vae, latents, CPU, nothing), expected
    )

    def cancel(done: int, total: int) -> None:
        assert list(tmp_path.iterdir()) == [] or done  # there may be a name while it works
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        StripDecode(1 << 22, OnDisk(tmp_path)).decode(vae, latents, CPU, cancel)
    assert list(tmp_path.iterdir()) == []
    assert not [each for each in threading.enumerate() if "lowvram" in each.name]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "map"))

    monkeypatch.setattr(feature_maps, "_allocate", full)
    vae = make("SDXL")
    with pytest.raises(errors.StorageError, match="No space left"):
        StripDecode(1 << 22, OnDisk(tmp_path)).decode(vae, torch.randn(1, 4, 8, 8), CPU, nothing)
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_and_unknown_blocks_are_refused() -> None:
    vae = make("SDXL")
    least = least_room(vae, 64, 64, torch.float32, "cpu")
    with pytest.raises(errors.RequestError, match="strips of this size"):
        StripDecode(least - 1, InRam()).decode(vae, torch.randn(1, 4, 8, 8), CPU, nothing)
    vae.decoder.conv_norm_out = torch.nn.LayerNorm(8)
    with pytest.raises(errors.RequestError, match="LayerNorm"):
        StripDecode(1 << 24, InRam()).decode(vae, torch.randn(1, 4, 8, 8), CPU, nothing)


_ON_A_FULL_DISK = """
import sys, torch
from pathlib import Path
from diffusers import AutoencoderKL
from lowvram import errors
from lowvram.families.pixart import FAMILY
from lowvram.pixels.feature_maps import OnDisk
from lowvram.pixels.strips import StripDecode
folder = Path(sys.argv[1])
vae = AutoencoderKL.from_config(FAMILY.tiny_configs["vae"]).eval().requires_grad_(False)
try:
    StripDecode(4 << 20, OnDisk(folder)).decode(
        vae, torch.randn(1, 4, 64, 64), torch.device("cpu"), lambda done, total: None
    )
except errors.StorageError as error:
    print(error.exit_code, str(error).count("\\n"), len(list(folder.iterdir())), error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system of its own")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """2 MiB for maps of 8: an error before a page is touched, which would be a SIGBUS."""
    mounted = f"mount -t tmpfs -o size=2m none {tmp_path}"
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*alone, mounted]).returncode:
        pytest.skip("not allowed to mount here")
    command = shlex.join([sys.executable, "-c", _ON_A_FULL_DISK, str(tmp_path)])
    done = subprocess.run(
        [*alone, f"{mounted} && exec {command}"], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("7 0 0 decode in strips could not write"), done.stdout
    assert "free some space" in done.stdout
