"""Embeddings that are kept: found by content, verified, bounded; and no text encoder needed."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import commands
from safetensors.torch import load_file
from test_repository import COMMIT, offline, put_in_cache

import lowvram
from lowvram import cli, embeds_cache, errors
from lowvram.repository import resolve
from lowvram.stages.texts import Text

__all__ = ["offline"]  # a fixture

PROMPT = "a red circle"


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, turned on."""
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(embeds_cache.VARIABLE)
    yield tmp_path / "cache" / "embeds"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each load of the text encoder had to encode."""
    from lowvram.stages import encode

    seen: list[int] = []
    real = encode._encode_all
    monkeypatch.setattr(encode, "_encode_all", lambda *a: seen.append(len(a[0])) or real(*a))
    return seen


def encode(model: Any, output: Path, prompt: str = PROMPT, **options: Any) -> bytes:
    lowvram.encode(prompt, str(model), output=output / "x.embeds.safetensors", **options)
    return (output / "x.embeds.safetensors").read_bytes()


def test_the_second_run_needs_no_text_encoder(
    offline: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are gone from the disk; another seed, another size, the same embeddings."""
    snapshot = put_in_cache(offline, "someone/finetune", COMMIT, tiny)
    options = {"steps": 1, "in_process": True}
    first = lowvram.run(PROMPT, "someone/finetune", tmp_path / "a.png", **options)
    for path in (snapshot / "text_encoder").glob("*.safetensors"):
        path.unlink()
    again = lowvram.run(
        PROMPT, "someone/finetune", tmp_path / "b.png", seed=2, size=(200, 256), **options
    )
    report = again.stages[0]
    assert report["weights"] == "from cache" and report["reasons"] == ["2 of 2 texts from cache"]
    assert report["weights_bytes"] == 0 and "from cache" in again.table()
    assert first.stages[0]["weights"] == "whole"
    assert again.images[0].embeds.read_bytes() == first.images[0].embeds.read_bytes()
    with pytest.raises(errors.ModelError, match=r"has no|not in the cache"):
        lowvram.run("a blue star", "someone/finetune", tmp_path / "c.png", **options)


def test_what_changes_the_bytes_changes_the_key(
    tiny: Path, tmp_path: Path, loads: list[int]
) -> None:
    first = encode(tiny, tmp_path)
    assert loads == [2]
    assert encode(tiny, tmp_path) == first and loads == [2]
    encode(tiny, tmp_path, PROMPT + " and a star")  # the negative text is there
    assert loads == [2, 1]
    for options in ({"dtype": "fp32"}, {"padding": "max"}, {"max_tokens": 4}, {"weights": "8bit"}):
        encode(tiny, tmp_path, **options)
        assert loads.pop() > 0 and loads == [2, 1], options
        encode(tiny, tmp_path, **options)
        assert loads == [2, 1], options
    # What cleaning makes the same is the same text.
    encode(tiny, tmp_path, PROMPT.upper(), clean_caption=False)
    assert loads == [2, 1]
    encode(tiny, tmp_path, cache=False)
    assert loads == [2, 1, 2]


def test_streamed_and_resident_share_on_a_cpu(tiny: Path, tmp_path: Path, loads: list[int]) -> None:
    """Because they compute the same bits, which this compares; files say what was asked."""
    tensors = []
    for weights, use in (("whole", False), ("stream", False), ("whole", True), ("stream", True)):
        encode(tiny, tmp_path, weights=weights, cache=use, device="cpu")
        tensors.append(load_file(tmp_path / "x.embeds.safetensors"))
        header = lowvram.api.artifacts.read_header(tmp_path / "x.embeds.safetensors")
        assert header.settings["weights"] == weights
    assert loads == [2, 2, 2]  # the last one came from the cache
    for other in tensors[1:]:
        assert all(torch.equal(tensors[0][name], other[name]) for name in tensors[0])


def test_models_with_the_same_encoder_share(tiny: Path, tmp_path: Path, loads: list[int]) -> None:
    """By content: another folder, another transformer. But not another encoder in its place."""
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    encode(tiny, tmp_path)
    encode(other, tmp_path)
    assert loads == [2]
    path = max((other / "text_encoder").glob("*.safetensors"), key=lambda each: each.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in the middle, where fingerprints do not look
    path.write_bytes(data)
    encode(other, tmp_path)
    assert loads == [2, 2]


def test_a_damaged_entry_is_made_again(
    tiny: Path, tmp_path: Path, kept: Path, loads: list[int]
) -> None:
    first = encode(tiny, tmp_path)
    whole = {path: path.read_bytes() for path in kept.glob("??/*.safetensors")}
    assert len(whole) == 2
    path = next(iter(whole))
    for damaged in (whole[path][:-1] + b"\xff", whole[path][:100], b"", *set(whole.values())):
        path.write_bytes(damaged)  # the last are whole entries, of which one is another text's
        assert encode(tiny, tmp_path) == first
        assert {each: each.read_bytes() for each in whole} == whole
    assert loads == [2, 1, 1, 1, 1]


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = encode(tiny, tmp_path, cache=False)
    (tmp_path / "cache").rmdir() if (tmp_path / "cache").is_dir() else None
    (tmp_path / "cache").write_text("in the way")
    assert encode(tiny, tmp_path) == expected
    told = [each.message for each in caplog.records if "are not kept" in each.message]
    assert len(told) == 1


def text(number: int) -> Text:
    return Text((number, 1), (1, 1), f"text {number}")


@pytest.fixture
def opened(tiny: Path) -> embeds_cache.EmbedsCache:
    return embeds_cache.EmbedsCache(resolve(str(tiny)), "e" * 64, "lossless", "float32", "cpu")


def test_many_writers_and_readers(opened: embeds_cache.EmbedsCache, kept: Path) -> None:
    """Entries are whole whoever writes, reads and deletes meanwhile."""

    def work(number: int) -> None:
        embeds = torch.full((2, 64), float(number % 5))
        opened.put(text(number % 5), {"prompt_embeds": embeds})
        if number % 7 == 0:
            embeds_cache.trim(2000)
        found = opened.get(text(number % 5))
        assert found is None or torch.equal(found["prompt_embeds"], embeds)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(200)))
    assert not list(kept.glob("??/.*.part"))
    embeds_cache.trim(0)
    assert embeds_cache.list_entries() == [] and opened.get(text(0)) is None


def test_padding_is_another_text(opened: embeds_cache.EmbedsCache) -> None:
    opened.put(Text((5, 0), (1, 1), ""), {"prompt_embeds": torch.zeros(2, 64)})
    assert opened.holds(Text((5, 0), (1, 1), "said otherwise"))
    assert not opened.holds(Text((5, 0), (1, 0), ""))


def test_it_keeps_to_its_size_and_forgets_the_oldest(
    opened: embeds_cache.EmbedsCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        opened.put(text(number), {"prompt_embeds": torch.zeros(2, 64)})
    for age, entry in enumerate(sorted(embeds_cache.list_entries(), key=lambda e: e.text)):
        os.utime(entry.path, (1000 - age, 1000 - age))  # text 3 was used longest ago
    assert opened.get(text(3)) is not None  # and is now the newest
    each = embeds_cache.list_entries()[0].bytes
    embeds_cache.trim(2 * each)
    assert [entry.text for entry in embeds_cache.list_entries()] == ["text 3", "text 0"]
    monkeypatch.setenv(embeds_cache.VARIABLE, "2MB")
    assert embeds_cache.limit_bytes() == 2_000_000
    monkeypatch.setenv(embeds_cache.VARIABLE, "much")
    with pytest.raises(errors.RequestError, match="LOWVRAM_EMBEDS_CACHE 'much' is not a size"):
        embeds_cache.limit_bytes()


def test_turned_off(
    tiny: Path, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(tiny, tmp_path, cache=False)
    monkeypatch.setenv(embeds_cache.VARIABLE, "off")
    encode(tiny, tmp_path)
    assert not kept.exists()


def test_listing_and_deleting(
    opened: embeds_cache.EmbedsCache, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        opened.put(text(number), {"prompt_embeds": torch.zeros(2, 64)})
    assert cli.exit_code(["cache", "ls", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["limit_bytes"] == 1 << 30 and len(shown["entries"]) == 3
    assert shown["bytes"] == sum(entry["bytes"] for entry in shown["entries"])
    name, path = shown["entries"][0]["name"], Path(shown["entries"][0]["path"])
    path.write_bytes(b"damaged")
    assert cli.exit_code(["cache", "ls"]) == 0
    listing = capsys.readouterr().out
    assert listing.count("text ") == 2 and "(damaged)" in listing and name in listing
    assert cli.exit_code(["cache", "rm", name]) == 0 and not path.exists()
    for wrong, says in (
        ([], "say what to delete"),
        ([name], "is called"),
        ([name, "--all"], "say what"),
        (["--older-than", "soon"], "is no time"),
    ):
        assert cli.exit_code(["cache", "rm", *wrong]) == 2
        assert says in capsys.readouterr().err
    old = embeds_cache.list_entries()[0]
    os.utime(old.path, (time.time() - 7200, time.time() - 7200))
    assert cli.exit_code(["cache", "rm", "--older-than", "1h", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": 1, "freed_bytes": old.bytes}
    assert cli.exit_code(["cache", "rm", "--all"]) == 0
    assert "deleted 1 texts" in capsys.readouterr().out
    assert embeds_cache.total_bytes() == 0


def test_the_page_about_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands("prompts.md"):
        own = ["--in-process"] if command[0] == "run" else []
        assert cli.exit_code([*command, *own]) == 0, command
    shown = capsys.readouterr().out
    assert "from cache" in shown and "a red circle on a white background" in shown
    assert Path("star.png").is_file() and Path("again.png").is_file()
