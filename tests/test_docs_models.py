"""docs/models.md and docs/sizes.md: their commands run, their tables are true."""

from pathlib import Path

import pytest
from pages import commands, text_of
from PIL import Image

from lowvram import cli
from lowvram.bins import bins
from lowvram.families import all_families
from lowvram.families.family import Family, Published
from lowvram.repository import DEFAULT_MODEL

ENTRIES = [
    (family, name, entry)
    for family in all_families().values()
    for name, entry in family.models.items()
]


@pytest.mark.parametrize("page", ["models.md", "sizes.md"])
def test_commands_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the demo model; of the others, that the program takes them."""
    monkeypatch.chdir(tmp_path)
    for line in commands(page):
        if "demo" in line or any(Path(word).exists() for word in line):
            line += ["--in-process"] if line[0] == "run" else []  # without imports for each
            assert cli.exit_code(line) == 0, line
        else:
            assert cli.exit_code([*line, "--help"]) == 0, line
    sizes = {}
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            sizes[path.name] = picture.size
    if page == "sizes.md":
        assert sizes == {"heart.png": (192, 128)}
    else:
        assert sizes == dict.fromkeys(("star.png", "swapped.png", "x.png"), (128, 128))


@pytest.mark.parametrize(("family", "name", "entry"), ENTRIES, ids=[name for _, name, _ in ENTRIES])
def test_every_model_is_listed(family: Family, name: str, entry: Published) -> None:
    rows = text_of("models.md").splitlines()
    (row,) = [row for row in rows if row.startswith(f"| `{name}` |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert entry.bundled or f"`{entry.repository}`" in cells[1]
    guidance = entry.guidance_scale or family.default_guidance_scale
    said = f"{entry.steps or family.default_steps}, {'off' if guidance <= 1 else f'{guidance:g}'}"
    assert cells[3] == said
    assert ("only" in cells[1] or "and" in cells[1].split("`")[-1]) == bool(entry.base)


def test_tables_of_sizes() -> None:
    text = text_of("sizes.md")
    for cells, name in ((32, "256 px"), (64, "512 px"), (128, "1024 px"), (256, "2K")):
        table = bins(cells)
        (height, width), (last_height, last_width) = (list(table.values())[i] for i in (0, -1))
        row = f"| {name} | {len(table)} sizes | {width}x{height} | {last_width}x{last_height} |"
        assert row in text


def test_what_is_fetched_for_later_is_the_pinned_commit() -> None:
    entry = next(entry for _, name, entry in ENTRIES if name == DEFAULT_MODEL)
    assert f"hf download {entry.repository} --revision {entry.revision}" in text_of("installing.md")
