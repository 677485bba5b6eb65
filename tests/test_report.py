"""A run's report: found, read whatever its age, shown as a table, a page and a plot."""

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from copy import deepcopy
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lowvram import cli, errors
from lowvram.memory import report_files
from lowvram.memory.chart import chart, ticks
from lowvram.memory.page import page
from lowvram.memory.plot import FORMATS, plot
from lowvram.memory.report import readable, table

# As version 0.1.0 before this page wrote them.
OLD_STAGE = {
    "stage": "decode",
    "device": "cpu",
    "weights": "whole",
    "dtype": "float32",
    "reasons": ["decode whole: the default", "float32: CPUs compute float16 slowly"],
    "seconds": 1.5,
    "load_seconds": 0.2,
    "compute_seconds": 0.5,
    "weights_bytes": 2_000_000,
    "peak_allocated_bytes": None,
    "peak_reserved_bytes": None,
    "peak_process_bytes": None,
    "peak_device_bytes": None,
    "peak_rss_bytes": 400_000_000,
    "left_allocated_bytes": None,
    "left_behind": [],
}
STAGE = OLD_STAGE | {
    "stage": "denoise",
    "device": "cuda",
    "reasons": ["weights <b>stream</b>: as asked"],
    "peak_allocated_bytes": 1_640_000_000,
    "peak_reserved_bytes": 1_900_000_000,
    "left_behind": ["blocks.0.weight"],
    "left_tensors": [
        {
            "owner": "blocks.0.weight",
            "held_by": "list",
            "shape": [8, 4],
            "dtype": "float16",
            "bytes": 64,
        }
    ],
    "timeline": {
        "columns": ["seconds", "allocated_bytes", "rss_bytes", "disk_read_bytes"],
        "rows": [[0.0, 0, 300_000_000, 0], [0.6, 1_640_000_000, None, 5], [1.2, 9, 4, 8_000_000]],
    },
    "marks": [[0.2, "load"], [0.7, "step <i>1"], [1.0, "compute"], [1.2, "release"]],
    "disk_read_bytes": 8_000_000,
    "budget_bytes": 2_000_000_000,
    "predicted": {"peak_allocated_bytes": 1_580_000_000, "disk_read_bytes": 7_000_000},
    "settings": {"steps": 20, "sigmas": [], "scheduler": "<i>DPM</i>"},
}
PROMPT = "a <script>alert('star')</script> & \"more\""


def write_run(folder: Path, prompt: str = PROMPT, stage: dict[str, Any] = STAGE) -> Path:
    """A picture and its report."""
    Image.new("RGB", (8, 6), "blue").save(folder / "x.png")
    image = {"path": str(folder / "x.png"), "prompt": prompt, "seed": 3, "width": 8, "height": 6}
    document = {"images": [image], "stages": [stage, OLD_STAGE]}
    path = folder / "x.report.json"
    path.write_text(report_files.to_text(document), encoding="utf-8")
    return path


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and text; unclosed tags at the end."""

    VOID = {"meta", "img", "line", "polyline"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", list[str]()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `lowvram report …`."""
    capsys.readouterr()
    code = cli.exit_code(["report", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    "name", ["x.report.json", "x.png", "x", "x-0.png", "x.latents.safetensors", ""]
)
def test_a_report_is_found_by_what_lies_beside_it(name: str, tmp_path: Path) -> None:
    path = write_run(tmp_path)
    assert report_files.find(tmp_path / name) == path


def test_a_dotted_name_is_no_suffix(tmp_path: Path) -> None:
    path = write_run(tmp_path).rename(tmp_path / "v1.5.report.json")
    assert report_files.find(tmp_path / "v1.5") == path
    assert report_files.find(tmp_path / "v1.5.png") == path


def test_a_folder_gives_its_newest_report(tmp_path: Path) -> None:
    newer = write_run(tmp_path)
    older = tmp_path / "z.report.json"
    older.write_bytes(newer.read_bytes())
    os.utime(older, (1, 1))
    assert report_files.find(tmp_path) == newer


def test_a_list_has_a_report_of_the_files_that_it_names_only(tmp_path: Path) -> None:
    image = {"path": "/elsewhere/a-star.png", "latents": str(tmp_path / "a.latents.safetensors")}
    path = tmp_path / report_files.OF_LIST
    path.write_text(json.dumps({"images": [image], "stages": [STAGE]}), encoding="utf-8")
    for name in ("a-star.png", "a-star", "a.latents.safetensors"):
        assert report_files.find(tmp_path / name) == path
    (tmp_path / "other.png").write_bytes(b"of another run")
    for name in ("typo.png", "other.png", "star.png"):
        with pytest.raises(errors.ArtifactError, match="has no report beside it"):
            report_files.find(tmp_path / name)


BAD = {
    "no such report": (["no.report.json"], 4, "no.report.json cannot be read"),
    "no such picture": (["no.png"], 4, r"has no report beside it \(no.report.json\)"),
    "empty folder": (["EMPTY"], 4, r"holds no \.report\.json"),
    "no JSON": (["bad.json"], 4, r"is not a report \(no JSON\)"),
    "another JSON": (["list.json"], 4, "is not a report"),
    "no stages": (["other.json"], 4, "no lists named images and stages"),
    "plot's suffix": (["x.png", "--plot", "y.jpg"], 2, r"y.jpg does not end in \.png or \.svg"),
    "plot without": (["x.png", "--plot", "y"], 2, "--plot y does not end"),
    "page over a picture": (["x.png", "--html", "x.png"], 2, r"does not end in \.html"),
    "nowhere to write": (["x.png", "--html", "bad.json/y.html"], 7, "could not write"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_a_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "bad.json").write_bytes(b"\x89PNG\xff")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "other.json").write_text('{"stages": 3}')
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    arguments, expected, says = BAD[name]
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (expected, "", 1)
    assert re.search(says, err), err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_old_reports_are_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, stage=OLD_STAGE)
    html, svg = tmp_path / "y.html", tmp_path / "y.svg"
    code, out, _ = run(capsys, path, "--html", html, "--plot", svg)
    assert code == 0
    assert out.endswith(f"\n{html}\n{svg}\n")
    assert "This report has no timeline." in Page(html.read_text(encoding="utf-8")).text
    titles = out.splitlines()[0].split()
    assert titles == ["stage", "weights", "dtype", "load", "compute", "RAM", "(RSS)"]


def test_nothing_is_written_unless_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, out, _ = run(capsys, path, "--json")
    assert (code, json.loads(out)) == (0, json.loads(path.read_text(encoding="utf-8")))
    assert run(capsys, path)[0] == 0
    assert sorted(tmp_path.iterdir()) == before


def test_the_table_with_and_without_predictions() -> None:
    lines = table([STAGE, OLD_STAGE]).splitlines()
    titles = re.split(r"\s{2,}", lines[0])
    denoise, decode = (re.split(r"\s{2,}", line) for line in lines[1:3])
    at = titles.index("allocated")
    assert titles[at : at + 3] == ["allocated", "(predicted)", "budget"]
    assert denoise[at : at + 3] == ["1.64 GB", "1.58 GB", "2.00 GB"]
    assert decode[at : at + 3] == ["-", "-", "-"]
    at = titles.index("read")
    assert (titles[at + 1], denoise[at : at + 2]) == ("(predicted)", ["8.0 MB", "7.0 MB"])
    assert titles[titles.index("RAM (RSS)") + 1] != "(predicted)"
    assert "total" not in titles  # load and compute say it, unless the whole was foretold
    assert lines[3] == (
        "denoise left behind: blocks.0.weight (8 × 4 float16, 0.06 kB, held by list)"
    )
    foretold = STAGE | {"predicted": {"seconds": 9.0}}
    titles = re.split(r"\s{2,}", table([foretold]).splitlines()[0])
    assert titles[titles.index("total") + 1] == "(predicted)"
    on_a_cpu = STAGE | {"peak_allocated_bytes": None}  # which counts no tensors
    assert "allocated (predicted)" in re.split(r"\s{2,}", table([on_a_cpu]).splitlines()[0])
    assert "predicted" not in table([OLD_STAGE])


def test_the_page_shows_every_text_and_runs_none(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    text = page(report_files.read(path), tmp_path)
    seen = Page(text)
    assert seen.open == []
    names = {tag for tag, _ in seen.tags}
    assert not names & {"script", "link", "iframe", "i", "object"}
    assert "<i>" not in text  # nor where this parser looks for no tags
    for shown in (PROMPT, "weights <b>stream</b>", "<i>DPM</i>", "step <i>1", "blocks.0.weight"):
        assert shown in seen.text
    for shown in ("budget 2.00 GB", "predicted allocated 1.58 GB", "(predicted 7.0 MB)"):
        assert shown in seen.text
    assert seen.text.count("<script>") == text.count("&lt;script&gt;") - 1  # one in an alt text
    kinds = [
        attributes.get("class") for tag, attributes in seen.tags if tag in ("line", "polyline")
    ]
    assert {"line allocated", "line rss", "line disk_read"} <= set(kinds)
    assert {"level budget", "level allocated"} <= set(kinds)
    assert (kinds.count("phase"), kinds.count("step")) == (3, 1)


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    seen = Page(text := page(report_files.read(write_run(tmp_path)), tmp_path))
    assert not re.search(r"https?:|//\w|@import|url\(", re.sub(r"base64,[^\"]*", "", text))
    sources = [value for _, each in seen.tags for key, value in each.items() if key == "src"]
    assert len(sources) == 1
    assert (sources[0] or "").startswith("data:image/png;base64,")
    assert not any(key in {"href", "srcset"} for _, each in seen.tags for key in each)
    policy = next(each["content"] for _, each in seen.tags if "http-equiv" in each)
    assert (policy or "").startswith("default-src 'none'")


def test_pictures_that_moved_or_went(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    document = report_files.read(path)
    document["images"][0]["path"] = "/elsewhere/x.png"
    assert "data:image/png" in page(document, tmp_path)
    (tmp_path / "x.png").write_bytes(b"no picture")
    assert "no longer there" in page(document, tmp_path)
    (tmp_path / "x.png").unlink()
    assert "no longer there" in page(document, tmp_path)


def test_a_large_picture_is_shown_smaller(tmp_path: Path) -> None:
    document = report_files.read(write_run(tmp_path))
    noise = Image.frombytes("RGB", (1200, 900), os.urandom(1200 * 900 * 3))
    noise.save(tmp_path / "x.png")
    text = page(document, tmp_path)
    assert "data:image/jpeg" in text and "shown smaller" in text
    assert len(text) < 2_000_000


@pytest.mark.parametrize("kind", FORMATS)
def test_plots_are_pictures_and_the_same_each_time(kind: str) -> None:
    data = plot([STAGE, OLD_STAGE], kind)
    assert data == plot([STAGE, OLD_STAGE], kind)
    if kind == "png":
        with Image.open(BytesIO(data)) as picture:
            picture.verify()
        assert picture.size[0] > 1000
    else:
        assert ElementTree.fromstring(data).tag.endswith("svg")


def test_a_budget_far_above_is_named_and_not_drawn() -> None:
    drawn = chart(STAGE | {"budget_bytes": 80_000_000_000})
    assert [level.title for level in drawn.levels] == ["predicted allocated"]
    assert [level.title for level in drawn.above] == ["budget"]
    assert drawn.top < 2_000_000_000


@given(st.floats(1e-6, 1e13))
def test_ticks_are_few_and_inside(top: float) -> None:
    found = ticks(top)
    assert found[0] == 0
    assert found[-1] <= top * (1 + 1e-9)
    assert 2 <= len(found) <= 6


def test_numbers_with_their_units() -> None:
    shown = [readable("_bytes", n) for n in (None, 0, 308, 2_650_000, 1.2e9, -6_000_000)]
    assert shown == ["-", "0.00 MB", "0.31 kB", "2.65 MB", "1.20 GB", "-6.0 MB"]


def test_the_file_is_the_document_with_rows_on_one_line() -> None:
    document = {"images": [{"prompt": 'a [\n 1,\n 2 ] "b"'}], "stages": [STAGE]}
    text = report_files.to_text(document)
    assert json.loads(text) == document
    assert "[0.6, 1640000000, null, 5]" in text
    assert '[0.2, "load"]' in text


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = [*STAGE, "notes", "timeline.columns", "timeline.rows", "left_tensors.0.shape", "marks.0"]


@settings(
    deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(field=st.sampled_from(FIELDS), value=ANY)
def test_a_report_is_refused_or_shown(field: str, value: object, tmp_path: Path) -> None:
    stage = deepcopy(STAGE)
    *parents, last = field.split(".")
    place: Any = stage
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    place[int(last) if last.isdigit() else last] = value
    path = tmp_path / "x.report.json"
    path.write_text(json.dumps({"images": [{"path": value}], "stages": [stage]}), encoding="utf-8")
    try:
        document = report_files.read(path)
    except errors.ArtifactError:
        return
    table(document["stages"])
    assert Page(page(document, tmp_path)).open == []


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["x.png"], "report"),
        (["no.report.json", "--json"], "report"),
        (["."], "report"),
        (["--html=y.html", "x"], "report"),
        (["a red heart", "-m", "demo", "-o", "x.png"], "run"),
        (["-m", "demo", "a red heart"], "run"),
        (["a very long prompt " * 300], "run"),
        (["--help"], "run"),
    ],
    ids=str,
)
def test_the_script_tells_a_run_from_a_prompt(
    arguments: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend("scripts")
    from scripts import memory_report

    assert memory_report.command(arguments) == command
