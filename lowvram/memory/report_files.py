"""The file that a run leaves beside its pictures: found, read and checked, written."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowvram.artifacts import SUFFIXES
from lowvram.errors import ArtifactError

SUFFIX = ".report.json"
OF_LIST = f"batch{SUFFIX}"  # of all pictures that were made from one list

_NUMBERS = (
    *(f"{name}_seconds" for name in ("load", "compute")),
    *(f"peak_{name}_bytes" for name in ("allocated", "reserved", "process", "device", "rss")),
    *("seconds", "weights_bytes", "left_allocated_bytes", "disk_read_bytes", "budget_bytes"),
)
_FILES = ("path", "unrefined", "start", "embeds", "latents")  # of an image
# Lists of numbers and names, on one line each: a timeline has up to 2000 of them. A line break
# inside of a text is written as \n, so what is matched here lies outside of texts.
_SHORT_LIST = re.compile(r'\[\s*\n\s*((?:-?[\d.e+-]+|null|"[\w .]*")(?:,\s*\n\s*|(?=\s*\n)))+\s*\]')

_LINE_BREAK = r"\s*\n\s*"


def find(run: Path) -> Path:
    """The report of a run: named itself, or by a picture or file beside it, or by its folder.

    Args:
        run: x.report.json; x.png, x or a file between the stages; or a folder, for its newest.

    Raises:
        ArtifactError: there is none; a list's counts only for the files that it names.
    """
    if run.is_dir():
        found = sorted(run.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
        if not found:
            raise ArtifactError(f"{run} holds no {SUFFIX}: lowvram run writes one beside a picture")
        return found[-1]
    if run.name.endswith(".json"):
        return run
    stem = _stem(run.name)
    numbered = re.sub(r"-\d+$", "", stem)  # of several pictures: x-0.png
    for name in (stem + SUFFIX, numbered + SUFFIX):
        path = run.with_name(name)
        if path.is_file():
            return path
    of_list = run.with_name(OF_LIST)
    if of_list.is_file() and stem in _stems_in(read(of_list)):
        return of_list
    raise ArtifactError(
        f"{run} has no report beside it ({stem}{SUFFIX}): name a run's picture, report or folder"
    )


def read(path: Path) -> dict[str, Any]:
    """A report that `run` wrote: {"images": […], "stages": […]}. Older ones lack some fields.

    Raises:
        ArtifactError: no such file, or not a report.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except (ValueError, RecursionError):
        raise _not_a_report(path, "no JSON") from None
    wrong = _wrong(document)
    if wrong:
        raise _not_a_report(path, wrong)
    return dict(document)


def to_text(document: Mapping[str, Any]) -> str:
    """A report's JSON for a file: indented, but with short lists on one line each.

    A lone surrogate, which UTF-8 has no bytes for, is written as JSON's escape.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False)
    return _SHORT_LIST.sub(_on_one_line, text).encode(errors="backslashreplace").decode() + "\n"


def _stem(name: str) -> str:
    """Of a picture's name, or of a file's between the stages."""
    known = (each for each in (*SUFFIXES.values(), ".png") if name.endswith(each))
    return name.removesuffix(next(known, ""))


def _stems_in(document: Mapping[str, Any]) -> set[str]:
    """Of all files that a report names."""
    return {
        _stem(Path(file).name)
        for image in document["images"]
        for name in _FILES
        if isinstance(file := image.get(name), str)
    }


def _on_one_line(found: re.Match[str]) -> str:
    items = found[0][1:-1].strip()
    return f"[{re.sub(_LINE_BREAK, ' ', items)}]"


def _not_a_report(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{path} is not a report ({why}): lowvram run writes x{SUFFIX}")


def _wrong(document: Any) -> str:
    """What a report cannot look like; "" when all that is shown of it has the right types."""
    if not isinstance(document, dict):
        return "not an object"
    images, stages = document.get("images"), document.get("stages")
    if not _are(images, dict) or not _are(stages, dict):
        return "no lists named images and stages"
    return next((why for why in map(_wrong_in, document["stages"]) if why), "")


def _wrong_in(stage: dict[str, Any]) -> str:
    if not isinstance(stage.get("stage"), str):
        return "a stage without a name"
    predicted = stage.get("predicted") or {}
    if not isinstance(predicted, dict) or not all(map(_is_number, predicted.values())):
        return "predicted is not an object of numbers"
    for name in _NUMBERS:
        if not _is_number(stage.get(name)):
            return f"{name} is not a number"
    for name in ("reasons", "left_behind", "notes"):
        if not _are(stage.get(name, []), str):
            return f"{name} is not a list of texts"
    if not _are_tensors(stage.get("left_tensors", [])):
        return "left_tensors are not objects with a shape and bytes"
    if not isinstance(stage.get("settings", {}), dict):
        return "settings is not an object"
    if not _are_marks(stage.get("marks", [])):
        return "marks are not pairs of seconds and names"
    return "" if _is_timeline(stage.get("timeline", {})) else "timeline is not a table of numbers"


def _are_tensors(tensors: Any) -> bool:
    return _are(tensors, dict) and all(
        isinstance(each.get("shape"), list) and _is_number(each.get("bytes")) for each in tensors
    )


def _are_marks(marks: Any) -> bool:
    return _are(marks, list) and all(
        len(mark) == 2 and _is_number(mark[0]) and mark[0] is not None and isinstance(mark[1], str)
        for mark in marks
    )


def _is_timeline(timeline: Any) -> bool:
    if timeline == {}:
        return True
    if not isinstance(timeline, dict) or not _are(timeline.get("columns"), str):
        return False
    columns, rows = timeline["columns"], timeline.get("rows") or []
    return (
        columns[:1] == ["seconds"]
        and _are(rows, list)
        and all(
            len(row) == len(columns) and row[0] is not None and all(map(_is_number, row))
            for row in rows
        )
    )


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _is_number(value: Any) -> bool:
    """Or unknown. NaN and infinity, which Python's JSON reads, are neither."""
    if value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e18
