"""Between two texts: the ends are the texts, and there is no jump beside them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file

import lowvram
from lowvram import artifacts, cli, errors
from lowvram.repository import resolve
from lowvram.stages.interpolate import between

SHORT = "a red heart"
LONG = "a large purple cross in the middle of a white background"


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("ends")
    paths = folder / "short.embeds.safetensors", folder / "long.embeds.safetensors"
    for path, prompt in zip(paths, (SHORT, LONG), strict=True):
        lowvram.encode(prompt, "demo", output=path, negative_prompt="blurry")
    return paths


def text(tensors: dict[str, torch.Tensor], number: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tensors[f"{number}.prompt_embeds"], tensors[f"{number}.prompt_attention_mask"]


def test_the_ends_are_the_texts(ends: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "x.embeds.safetensors"
    header = lowvram.interpolate(*ends, output=output, at=[0, 0.25, 1])
    read, found = artifacts.read(output, "embeds")
    first, last = (artifacts.read(path, "embeds") for path in ends)
    assert header == read and header.made_from == first[0].key
    assert header.settings["towards"] == last[0].key and header.settings["at"] == [0, 0.25, 1]
    for number, (_, expected) in ((0, first), (2, last)):
        for name in ("prompt_embeds", "prompt_attention_mask"):
            for part in ("", "negative_"):
                assert torch.equal(found[f"{number}.{part}{name}"], expected[f"0.{part}{name}"])
    assert [item["prompt"] for item in header.items] == [
        SHORT, f"{SHORT} [0.75] {LONG} [0.25]", LONG,
    ]  # fmt: skip
    assert header.items[1]["negative_prompt"] == "blurry"
    negative = found["1.negative_prompt_embeds"]
    assert torch.equal(negative, found["0.negative_prompt_embeds"])  # nothing to go between
    again = lowvram.interpolate(*ends, output=output, at=[0, 0.25, 1])
    assert again.key == header.key


def test_no_jump_beside_the_ends(tmp_path: Path) -> None:
    """What the transformer says just beside an end is what it says at the end, whatever the
    lengths of the texts; and it moves over from the one to the other.
    """
    output = tmp_path / "x.embeds.safetensors"
    lowvram.encode([SHORT, LONG], "demo", output=output, dtype="fp32")
    tensors = load_file(output)
    folder = resolve("demo").sources["transformer"].folder / "transformer"
    transformer = PixArtTransformer2DModel.from_pretrained(folder).eval()
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def said(at: float, limit: int = 300) -> torch.Tensor:
        embeds, mask = between(text(tensors, 0), text(tensors, 1), at, limit)
        return transformer(
            noise,
            encoder_hidden_states=embeds.expand(4, -1, -1),
            encoder_attention_mask=mask.expand(4, -1),
            timestep=torch.full((4,), 600),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]

    start, end = said(0), said(1)
    apart = (end - start).norm()
    assert len(text(tensors, 0)[0]) != len(text(tensors, 1)[0])
    assert (said(1e-7) - start).norm() <= 1e-4 * apart
    assert (said(1 - 1e-7) - end).norm() <= 1e-4 * apart
    away = [float((said(at) - start).norm() / apart) for at in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert away == sorted(away) and away[0] < 0.35 and away[-1] > 0.65


@pytest.mark.parametrize(("one", "other"), [(1, 1), (2, 300), (37, 23), (299, 300), (7, 21)])
def test_any_two_lengths(one: int, other: int) -> None:
    texts = [(torch.randn(n, 8), torch.ones(n, dtype=torch.long)) for n in (one, other)]
    embeds, mask = between(texts[0], texts[1], 0.5, 300)
    assert max(one, other) <= len(embeds) == len(mask) == int(mask.sum()) <= 300
    wide = torch.cat([texts[0][0], torch.zeros(5, 8)])  # as --padding max leaves it
    padded = (wide, torch.cat([texts[0][1], torch.zeros(5, dtype=torch.long)]))
    assert torch.equal(between(padded, texts[1], 0.5, 300)[0], embeds)


def test_several_prompts_become_pictures(ends: tuple[Path, Path], tmp_path: Path) -> None:
    """From the command line to pictures: the ends are the pictures of the texts."""
    walk, single = tmp_path / "walk.embeds.safetensors", tmp_path / "x.latents.safetensors"
    command = ["interpolate", *map(str, ends), "--at", "0,0.5,1", "-o", str(walk)]
    assert cli.exit_code(command) == 0
    lowvram.denoise(walk, output=tmp_path / "w.latents.safetensors", seed=3, steps=4)
    found = load_file(tmp_path / "w.latents.safetensors")["latents"]
    for number, path in ((0, ends[0]), (2, ends[1])):
        lowvram.denoise(path, output=single, seed=3, steps=4)
        assert torch.equal(found[number], load_file(single)["latents"][0])


def test_json(ends: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "x.embeds.safetensors"
    assert cli.exit_code(["interpolate", *map(str, ends), "-o", str(output), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [each["at"] for each in document["texts"]] == [0, 0.25, 0.5, 0.75, 1]


def test_what_does_not_go_together(ends: tuple[Path, Path], tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.embeds.safetensors"
    made = {}
    options: dict[str, Any]
    for name, prompts, model, options in (
        ("tiny", SHORT, str(tiny), {}),
        ("two", [SHORT, LONG], "demo", {}),
        ("fp32", SHORT, "demo", {"dtype": "fp32"}),
    ):
        made[name] = tmp_path / f"{name}.embeds.safetensors"
        lowvram.encode(prompts, model, output=made[name], **options)
    for name, says in (
        ("tiny", "different text encoders"),
        ("two", "hold 1 and 2 prompts"),
        ("fp32", "different dtypes: encode both with the same --dtype"),
    ):
        with pytest.raises(errors.RequestError, match=says):
            lowvram.interpolate(ends[0], made[name], output=output)
    with pytest.raises(errors.RequestError, match="give 1 to 1000 numbers from 0 to 1"):
        lowvram.interpolate(*ends, output=output, at=[2])
    with pytest.raises(errors.RequestError, match="is the input"):
        lowvram.interpolate(*ends, output=ends[1])
    assert not output.exists()
