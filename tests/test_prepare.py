"""Prepared checkpoints: equal to what the libraries would load and save, whole or not there."""

import errno
import json
import shutil
import signal
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file
from transformers import T5EncoderModel, T5Tokenizer

from lowvram import errors, prepared, prepared_folders, repository
from lowvram.memory.count import LiveBytes
from lowvram.progress import Progress
from lowvram.stages import prepare as stage
from lowvram.stages.prepare import prepare
from lowvram.weights import conversion, tensor_files
from lowvram.weights.checkpoint import counted_bytes
from lowvram.weights.quantized import Quantized
from lowvram.weights.whole import Whole

CPU = torch.device("cpu")
STRATEGIES = {
    "bf16": Whole(torch.bfloat16),
    "8bit": Quantized(8, torch.bfloat16),
    "4bit": Quantized(4, torch.bfloat16),
}
BEGIN = """
import sys
from pathlib import Path
from lowvram import prepared, prepared_folders, repository
model = repository.resolve(sys.argv[1])
wanted = prepared.describe(model, "text_encoder", "4bit", "bfloat16")
target = prepared_folders.place(wanted, Path(sys.argv[2]))
with prepared_folders.locked(target):
    prepared_folders.part_of(target).mkdir(parents=True)
    (prepared_folders.part_of(target) / prepared_folders.MARK).touch()
    prepared_folders.point(wanted, target)
    (prepared_folders.part_of(target) / "model.safetensors").write_bytes(b"half of it")
    print("begun", flush=True)
    sys.stdin.readline()
"""  # what `prepare` does before and while it writes, without its imports


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for each test."""
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files so small that the tiny model has several."""
    monkeypatch.setattr(conversion, "SHARD_BYTES", 50_000)


@pytest.fixture(params=[str(code) for code in (errno.ENOSPC, errno.EIO)])
def full_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A disk that fails in the middle of the text encoder's values."""
    code = int(request.param)
    real = tensor_files._bytes_of
    calls = iter(range(10))

    def fail(tensor: torch.Tensor) -> memoryview:
        if next(calls) == 5:
            raise OSError(code, "as if")
        return real(tensor)

    monkeypatch.setattr(tensor_files, "_bytes_of", fail)
    return code


def found(model: repository.Model, role: str, weights: str, dtype: str) -> Path:
    """The folder, which must be there."""
    folder = prepared.find(model, role, weights, dtype)
    assert folder is not None
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's files."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Same names, types, shapes and bits."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        ours, theirs = (t.contiguous().view(-1).view(torch.uint8) for t in (tensor, other))
        assert torch.equal(ours, theirs), name


def file_order(path: Path) -> list[str]:
    """Names of a file's tensors as they lie in it."""
    with open(path, "rb") as file:
        listing = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    del listing["__metadata__"]
    return sorted(listing, key=lambda name: listing[name]["data_offsets"])


def leftovers(cache: Path) -> list[Path]:
    """What no finished component and no lock accounts for."""
    return [path for path in cache.rglob("*") if path.name.endswith((".part", ".elsewhere"))]


@pytest.mark.parametrize("weights", STRATEGIES)
def test_it_is_what_the_library_would_save(
    weights: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(repository.resolve(str(tiny)), weights)
    ours = found(repository.resolve(str(tiny)), "text_encoder", _name(weights), "bfloat16")
    loaded = STRATEGIES[weights].load(T5EncoderModel, tiny / "text_encoder", CPU)
    loaded.model.save_pretrained(tmp_path / "official")
    assert_same(tensors(ours), tensors(tmp_path / "official"))
    official = (tmp_path / "official" / "config.json").read_text()
    assert (ours / "config.json").read_text() == official


@pytest.mark.parametrize("weights", STRATEGIES)
@pytest.mark.parametrize("name", ["tiny", "demo"])
@pytest.mark.usefixtures("small_files")
def test_it_loads_as_the_source_does(weights: str, name: str, tiny: Path) -> None:
    model = repository.resolve("demo" if name == "demo" else str(tiny))
    made = prepare(model, weights)
    roles = ["tokenizer", "text_encoder"] + (["transformer"] if weights == "bf16" else [])
    assert [each.role for each in made] == roles
    strategy = STRATEGIES[weights]
    ours = found(model, "text_encoder", _name(weights), "bfloat16")
    assert len(list(ours.glob("model-*-of-*.safetensors"))) > 1
    from_ours, from_source = (
        strategy.load(T5EncoderModel, folder, CPU).model
        for folder in (ours, model.fetch("text_encoder"))
    )
    assert_same(from_ours.state_dict(), from_source.state_dict())
    assert counted_bytes(from_ours) == counted_bytes(from_source)
    if weights == "bf16":
        half = Whole(torch.float16)
        both = (found(model, "transformer", "whole", "float16"), model.fetch("transformer"))
        states = [half.load(PixArtTransformer2DModel, f, CPU).model.state_dict() for f in both]
        assert_same(*states)
        assert {t.dtype for t in tensors(both[0]).values()} == {torch.float16}
    ids, mask = torch.tensor([[5, 6, 7, 1]]), torch.ones(1, 4, dtype=torch.long)
    with torch.inference_mode():
        embeds = [m(ids, attention_mask=mask)[0] for m in (from_ours, from_source)]
    assert torch.equal(*embeds)


def _name(weights: str) -> str:
    return "whole" if weights == "bf16" else weights


@pytest.mark.parametrize("weights", ["bf16", "4bit"])
@pytest.mark.usefixtures("small_files")
def test_tensors_lie_in_streaming_order(weights: str, tiny: Path) -> None:
    model = repository.resolve(str(tiny))
    prepare(model, weights)
    folder = found(model, "text_encoder", _name(weights), "bfloat16")
    files = sorted(folder.glob("*.safetensors"))
    orders = [file_order(path) for path in files]
    # bitsandbytes' descriptions have odd lengths, and lie behind what they would misalign
    names = [n for order in orders for n in order if "quant_state" not in n]
    registered = list(T5EncoderModel.from_pretrained(tiny / "text_encoder").state_dict())
    registered.remove("encoder.embed_tokens.weight")
    resident = [name for name in registered if ".block." not in name]
    assert len(resident) == 2
    expected = resident + [name for name in registered if ".block." in name]
    assert [name for name in names if name in registered] == expected
    blocks = [{n.split(".")[2] for n in order if ".block." in n} for order in orders]
    assert all(not left & right for left, right in pairwise(blocks))
    assert blocks[-1] == {"1"}


def test_tensors_of_odd_length_misalign_nothing(tmp_path: Path) -> None:
    odd = torch.arange(79, dtype=torch.uint8)
    values = {"a": odd, "b": torch.randn(3, 4), "c": torch.ones(3, dtype=torch.bfloat16), "d": odd}
    specs = [tensor_files.Spec(n, t.dtype, tuple(t.shape)) for n, t in values.items()]
    ordered = tensor_files.in_file_order(specs)
    assert [spec.name for spec in ordered] == ["b", "c", "a", "d"]
    path = tmp_path / "x.safetensors"
    tensor_files.write_file(path, ordered, (values[spec.name] for spec in ordered))
    assert_same(load_file(path), values)


@pytest.mark.parametrize("length", [10, 12])
def test_a_file_holds_exactly_what_its_header_says(length: int, tmp_path: Path) -> None:
    specs = [tensor_files.Spec("a", torch.float32, (11,))]
    with pytest.raises(ValueError, match="planned"):
        tensor_files.write_file(tmp_path / "x", specs, [torch.zeros(length)])


def test_the_tokenizer_is_fast_and_the_same(tiny: Path) -> None:
    model = repository.resolve(str(tiny))
    prepare(model, "8bit")
    folder = found(model, "tokenizer", "", "")
    assert (folder / "tokenizer.json").is_file() and not (folder / "spiece.model").exists()
    ours, source = (T5Tokenizer.from_pretrained(f) for f in (folder, model.fetch("tokenizer")))
    for text in ("a red circle, naïve 東京", "</s> <extra_id_3>", "x " * 400):
        assert ours(text).input_ids == source(text).input_ids


def test_a_tokenizer_that_reads_otherwise_is_refused(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = T5Tokenizer.save_pretrained

    def save(self: Any, folder: Path) -> None:
        real(self, folder)
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace('"▁a"', '"▁qqq"'))

    monkeypatch.setattr(T5Tokenizer, "save_pretrained", save)
    with pytest.raises(errors.ModelError, match=r"reads “.*” otherwise"):
        prepare(repository.resolve(str(tiny)), "8bit")
    assert prepared.list_prepared() == [] and leftovers(cache) == []


def test_found_only_where_everything_matches(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    model = repository.resolve(str(source))
    asked = ("text_encoder", "8bit", "bfloat16")
    assert prepared.find(model, *asked) is None
    prepare(model, "8bit")
    folder = found(model, *asked)
    assert prepared.fetch(model, *asked) == (folder, "prepared (text_encoder-8bit)")
    for other in (("text_encoder", "8bit", "float32"), ("text_encoder", "4bit", "bfloat16")):
        assert prepared.find(model, *other) is None
    assert prepared.find(model, "text_encoder", "whole", "bfloat16") is None
    assert prepared.fetch(model, "text_encoder", "whole", "bfloat16")[1] == ""
    assert prepared.find(repository.resolve(str(tiny)), *asked) == folder  # the same content

    weights = next(folder.glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert prepared.find(model, *asked) is None
    assert [e.state for e in prepared.list_prepared()] == ["damaged", "ready"]
    weights.unlink()
    assert prepared.find(model, *asked) is None
    weights.write_bytes(content)
    assert prepared.find(model, *asked) == folder

    config = source / "text_encoder" / "config.json"
    config.write_text(
        config.read_text().replace('"layer_norm_epsilon": 1e-06', '"layer_norm_epsilon": 1e-05')
    )
    assert "1e-05" in config.read_text()
    changed = repository.resolve(str(source))
    assert prepared.find(changed, *asked) is None
    assert prepared.find(changed, "tokenizer", "", "") is not None
    prepare(changed, "8bit")  # replaces it
    assert prepared.find(changed, *asked) == folder and prepared.find(model, *asked) is None


def test_commits_of_a_repository_lie_side_by_side() -> None:
    places = set()
    for commit in ("a" * 40, "b" * 40):
        source = repository.Source("owner/some name", commit, "hub")
        model = repository.Model("owner/x", "pixart-sigma", {"text_encoder": source}, 20, 4.5)
        places.add(
            prepared_folders.place(prepared.describe(model, "text_encoder", "8bit", "bfloat16"))
        )
    assert len(places) == 2
    assert {path.parent.name[:-8] for path in places} == {"some-name-"}


def test_what_is_there_is_not_made_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = repository.resolve(str(tiny))
    first = prepare(model, "4bit")
    monkeypatch.setattr(repository.Model, "fetch", None)  # the original files are not asked for
    assert prepare(model, "4bit") == first


@pytest.mark.parametrize("doing", ["writing", "verifying"])
@pytest.mark.usefixtures("small_files")
def test_interrupted_then_made_again(doing: str, tiny: Path, cache: Path) -> None:
    model = repository.resolve(str(tiny))

    def interrupt(progress: Progress) -> None:
        assert progress.stage == "prepare" and 0 <= progress.done <= progress.total
        if progress.doing.startswith(f"{doing} text") and progress.done == progress.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(model, "4bit", on_progress=interrupt)
    assert prepared.find(model, "text_encoder", "4bit", "bfloat16") is None
    assert [e.name.rpartition("/")[2] for e in prepared.list_prepared()] == ["tokenizer"]
    assert leftovers(cache) == []
    prepare(model, "4bit")
    assert found(model, "text_encoder", "4bit", "bfloat16")


def test_killed_then_listed_and_removed(tiny: Path, tmp_path: Path) -> None:
    model = repository.resolve(str(tiny))
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN, str(tiny), str(tmp_path / "disk")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    with pytest.raises(errors.StorageError, match="by another process"):
        prepared.remove(_only("unfinished").name)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert prepared.find(model, "text_encoder", "4bit", "bfloat16") is None
    unfinished = _only("unfinished")
    assert unfinished.path.name == "text_encoder-4bit.part" and unfinished.bytes == 10
    assert prepared.remove(unfinished.name) == 10
    assert prepared.list_prepared() == [] and list((tmp_path / "disk").iterdir()) == []


def _only(state: str) -> prepared.Entry:
    (entry,) = [entry for entry in prepared.list_prepared() if entry.state == state]
    return entry


@pytest.mark.parametrize(
    "left", [[], [prepared_folders.MARK], [prepared_folders.MARK, "model.safetensors"]]
)
def test_what_was_left_behind_is_made_anew(left: list[str], tiny: Path, cache: Path) -> None:
    model = repository.resolve(str(tiny))
    target = prepared_folders.place(prepared.describe(model, "text_encoder", "8bit", "bfloat16"))
    prepared_folders.part_of(target).mkdir(parents=True)
    for name in left:
        (prepared_folders.part_of(target) / name).write_bytes(b"half of it")
    assert _only("unfinished").path == prepared_folders.part_of(target)
    prepare(model, "8bit")
    assert prepared.find(model, "text_encoder", "8bit", "bfloat16") == target
    assert leftovers(cache) == []


def test_two_at_once(tiny: Path) -> None:
    model, begun, go_on = repository.resolve(str(tiny)), threading.Event(), threading.Event()
    seen, results = [], []

    def hold(progress: Progress) -> None:
        if progress.doing.startswith("writing text"):
            begun.set()
            assert go_on.wait(60)

    def watch(progress: Progress) -> None:
        seen.append(progress.doing)
        go_on.set()

    first = threading.Thread(target=lambda: results.append(prepare(model, "4bit", None, hold)))
    first.start()
    assert begun.wait(60)
    second = prepare(model, "4bit", on_progress=watch)
    first.join()
    assert seen == ["waiting for another process to finish the text encoder"]
    assert results == [second]


@pytest.mark.parametrize("where", ["value", "header", "tail"])
@pytest.mark.usefixtures("small_files")
def test_a_damaged_write_is_noticed(
    where: str, tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = conversion.write_file

    def write(path: Path, *rest: Any) -> None:
        real(path, *rest)
        if "-00002-" in path.name:
            content = bytearray(path.read_bytes())
            content[{"value": -200, "header": 30, "tail": -1}[where]] ^= 1
            path.write_bytes(content[:-1] if where == "tail" else content)

    monkeypatch.setattr(conversion, "write_file", write)
    model = repository.resolve(str(tiny))
    with pytest.raises(errors.StorageError, match="did not hold what was written") as caught:
        prepare(model, "8bit")
    assert ("header" if where == "header" else "encoder.block.") in str(caught.value)
    assert prepared.find(model, "text_encoder", "8bit", "bfloat16") is None
    assert leftovers(cache) == []


def test_a_full_disk_leaves_nothing(full_disk: int, tiny: Path, cache: Path) -> None:
    model = repository.resolve(str(tiny))
    with pytest.raises(errors.StorageError, match="another disk with --to") as caught:
        prepare(model, "bf16")
    assert ("free some space" in str(caught.value)) == (full_disk == errno.ENOSPC)
    assert [e.name.rpartition("/")[2] for e in prepared.list_prepared()] == ["tokenizer"]
    assert leftovers(cache) == []


def test_too_little_space_is_known_before(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(repository.resolve(str(tiny)), "bf16")
    needs = 16_000_000 + 130_000
    usage = shutil.disk_usage(tiny)._replace(free=needs)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(conversion, "write_file", None)
    with pytest.raises(errors.StorageError, match=r"has 16\.1 MB free and \d+\.\d MB are needed"):
        prepare(repository.resolve(str(tiny)), "4bit")
    assert leftovers(cache) == []


def test_listed_and_removed(tiny: Path, cache: Path) -> None:
    model = repository.resolve(str(tiny))
    for weights in STRATEGIES:
        prepare(model, weights)
    entries = {entry.path.name: entry for entry in prepared.list_prepared()}
    assert list(entries) == [
        "text_encoder-4bit", "text_encoder-8bit", "text_encoder-bfloat16", "tokenizer",
        "transformer-float16",
    ]  # fmt: skip
    sizes = [entries[f"text_encoder-{form}"].bytes for form in ("4bit", "8bit", "bfloat16")]
    assert sizes == sorted(sizes)
    for entry in entries.values():
        assert entry.prepared is not None and entry.state == "ready"
        assert entry.name == f"{tiny}/{entry.path.name}"
        assert entry.prepared.source == model.sources[entry.prepared.role]
        assert entry.bytes == sum(file.stat().st_size for file in entry.path.iterdir())
    assert "bitsandbytes" in entries["text_encoder-8bit"].prepared.versions

    assert prepared.remove(f"{tiny}/text_encoder-4bit") == entries["text_encoder-4bit"].bytes
    path = entries["text_encoder-8bit"].path
    assert prepared.remove(path) == entries["text_encoder-8bit"].bytes
    assert not path.exists()
    assert len(prepared.list_prepared()) == 3
    prepared.remove(str(tiny))
    assert prepared.list_prepared() == []
    assert [each.name for each in (cache / "prepared").iterdir()] == [".locks"]
    with pytest.raises(errors.RequestError, match="nothing prepared is called"):
        prepared.remove(str(tiny))


def test_nothing_of_others_is_deleted(tiny: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(errors.RequestError, match="nothing prepared"):
        prepared.remove(foreign)
    prepare(repository.resolve(str(tiny)), "8bit")
    target = found(repository.resolve(str(tiny)), "text_encoder", "8bit", "bfloat16")
    prepared.remove(target)
    for name in (target.name, f"{target.name}.part"):
        shutil.copytree(foreign, target.with_name(name))
        with pytest.raises(errors.StorageError, match="was not made by lowvram"):
            prepare(repository.resolve(str(tiny)), "8bit")
        with pytest.raises(errors.StorageError, match="was not made by lowvram"):
            prepared.remove(target.with_name(name))
        assert (target.with_name(name) / "model.safetensors").read_bytes() == b"mine"
        shutil.rmtree(target.with_name(name))
    link = tmp_path / "link"
    link.symlink_to(found(repository.resolve(str(tiny)), "tokenizer", "", ""))
    with pytest.raises(errors.RequestError, match="nothing prepared"):
        prepared.remove(link)


def test_elsewhere_is_found_and_may_vanish(tiny: Path, tmp_path: Path) -> None:
    model, disk = repository.resolve(str(tiny)), tmp_path / "disk"
    prepare(model, "8bit", to=disk)
    folder = found(model, "text_encoder", "8bit", "bfloat16")
    assert folder.is_relative_to(disk)
    disk.rename(tmp_path / "unplugged")
    assert prepared.find(model, "text_encoder", "8bit", "bfloat16") is None
    assert [e.state for e in prepared.list_prepared()] == ["missing", "missing"]
    (tmp_path / "unplugged").rename(disk)
    assert [e.state for e in prepared.list_prepared()] == ["ready", "ready"]
    prepared.remove(folder)
    disk.rename(tmp_path / "unplugged")
    assert prepared.remove(_only("missing").name) == 0
    assert prepared.list_prepared() == []
    (tmp_path / "unplugged").rename(disk)
    prepare(model, "8bit", to=disk)  # the tokenizer is there and is known again
    assert [e.state for e in prepared.list_prepared()] == ["ready", "ready"]
    assert prepared.remove(str(tiny)) > 0 and list(disk.iterdir()) == []


def test_a_manifest_that_makes_no_sense_counts_as_none(tiny: Path) -> None:
    model = repository.resolve(str(tiny))
    prepare(model, "8bit")
    path = found(model, "tokenizer", "", "") / prepared.MANIFEST
    good = json.loads(path.read_text())
    odd: list[Any] = [[], {}, good | {"version": 99}, good | {"files": {"x": 1}}]
    odd += [good | {"source": "x"}, good | {"unknown": 1}, good | {"files": {}}]
    for value in odd:
        path.write_text(json.dumps(value))
        assert prepared.find(model, "tokenizer", "", "") is None, value
        prepared.list_prepared()
    path.write_text(json.dumps(good))
    assert prepared.find(model, "tokenizer", "", "") is not None


def test_refused_in_one_line(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.RequestError, match="--weights 2bit is not known"):
        prepare(repository.resolve(str(tiny)), "2bit")
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    prepare(repository.resolve(str(tiny)), "8bit")
    shutil.rmtree(source / "text_encoder")
    ours = found(repository.resolve(str(tiny)), "text_encoder", "8bit", "bfloat16")
    shutil.copytree(ours, source / "text_encoder")
    for weights in STRATEGIES:
        with pytest.raises(errors.ModelError, match="is quantised already"):
            prepare(repository.resolve(str(source)), weights)


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_source_that_does_not_fit_is_refused(damage: str, tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    if damage == "missing":
        config = source / "text_encoder" / "config.json"
        config.write_text(config.read_text().replace('"num_layers": 2', '"num_layers": 3'))
    else:
        config = source / "text_encoder" / "config.json"
        config.write_text(config.read_text().replace('"d_ff": 128', '"d_ff": 256'))
    match = {"missing": "lacks 9 weights", "shape": "but its config.json says"}[damage]
    with pytest.raises(errors.ModelError, match=match):
        prepare(repository.resolve(str(source)), "bf16")


def test_weights_kept_in_float32_stay_so(tiny: Path, tmp_path: Path) -> None:
    strategy = Whole(torch.float16)
    made = conversion.Conversion(T5EncoderModel, tiny / "text_encoder", strategy, "encoder.block")
    folder = tmp_path / "half"
    folder.mkdir()
    made.write(folder, lambda done: None)
    loaded = strategy.load(T5EncoderModel, tiny / "text_encoder", CPU).model.state_dict()
    del loaded["encoder.embed_tokens.weight"]
    assert_same(tensors(folder), loaded)
    assert {str(t.dtype) for t in loaded.values()} == {"torch.float16", "torch.float32"}


@pytest.mark.parametrize("weights", STRATEGIES)
def test_a_few_tensors_in_memory_at_a_time(weights: str, tiny: Path, tmp_path: Path) -> None:
    with LiveBytes("cpu") as live:
        made = conversion.Conversion(
            T5EncoderModel, tiny / "text_encoder", STRATEGIES[weights], "encoder.block"
        )
        made.write(tmp_path, lambda done: None)
        made.verify(tmp_path, lambda done: None)
    table = 512 * 64 * 4  # the largest tensor as it is published; in bfloat16 all take 230 kB
    assert live.peak < 1.6 * table  # the table in both types, and little else


def test_a_tied_weight_that_is_stored_twice_must_be_one(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "twice"
    folder.mkdir()
    shutil.copy(tiny / "text_encoder" / "config.json", folder)
    values = tensors(tiny / "text_encoder")
    for other, fits in ((values["shared.weight"].clone(), True), (torch.zeros(512, 64), False)):
        save_file({**values, "encoder.embed_tokens.weight": other}, folder / "model.safetensors")
        arguments = (T5EncoderModel, folder, STRATEGIES["bf16"], "encoder.block")
        if fits:
            names = [e.name for shard in conversion.Conversion(*arguments).shards for e in shard]
            assert "encoder.embed_tokens.weight" not in names
        else:
            with pytest.raises(errors.ModelError, match="should be one tensor"):
                conversion.Conversion(*arguments)
