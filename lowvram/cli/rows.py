"""Lists of prompts: text, CSV with a header, or JSON Lines, read into rows for `run --prompts`.

A row's fields have the names of the command line's options, and are read as these are.
"""

import csv
import inspect
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from lowvram.errors import LowvramError, RequestError
from lowvram.rows import REFINING, SHARED, Listed, Row, others_of

_DELIMITERS = (",", ";", "\t")
_OWN = ("prompt", "output")  # the fields that are no option of every row
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Line:
    """A row as it was read.

    Attributes:
        number: of the line that it begins on.
        fields: as they stand there; or what is wrong with the row.
    """

    number: int
    fields: Mapping[str, Any] | LowvramError


@dataclass(frozen=True)
class Field:
    """An option that a row may set.

    Attributes:
        parameter: its name in the command's function.
        kind: str, int, float, bool or Path.
    """

    parameter: str
    kind: Any


def fields_of(command: Callable[..., Any], shared: Sequence[str]) -> dict[str, Field]:
    """The options of a command by their names on the command line, "max_tokens" for --max-tokens.

    Args:
        shared: parameters that are one for all rows.
    """
    found = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind, *metadata = get_args(parameter.annotation) or (parameter.annotation,)
        # Inside of Annotated, typer takes the first name for a default.
        declared = [
            text
            for each in metadata
            for text in (
                getattr(each, "default", None),
                *(getattr(each, "param_decls", None) or ()),
            )
        ]
        long = next((text for text in declared if str(text).startswith("--")), None)
        if long is not None and name not in shared:
            found[_plain(str(long).split("/")[0])] = Field(name, _without_none(kind))
    return found


def read_lines(name: str, known: Mapping[str, Field]) -> list[Line]:
    """The rows of a file, by its ending: .csv, .jsonl or .ndjson, else text; "-" for standard
    input, which is looked at.

    Raises:
        RequestError: it cannot be read, or its header makes no sense.
    """
    text = _read(name)
    kind = Path(name).suffix.lower() if name != "-" else _look(text)
    if kind in (".jsonl", ".ndjson"):
        return list(_json_lines(text))
    if kind in (".csv", ".tsv"):
        return list(_csv_lines(name, text, known))
    return list(_text_lines(text))


def parameters_of(fields: Mapping[str, Any], known: Mapping[str, Field]) -> dict[str, Any]:
    """What a row sets, by the parameters of the command.

    Raises:
        RequestError: names the field, its value and the way out.
    """
    read = {}
    for name, value in fields.items():
        field = known.get(_plain(name))
        if field is None:
            names = ", ".join(sorted({*_OWN, *known}))
            raise RequestError(f"a row has no {name!r}: use {names}")
        if value is not None and value != "":
            read[field.parameter] = _as(field.kind, name, value)
    return read


def to_listed(
    line: Line,
    known: Mapping[str, Field],
    given: Mapping[str, Any],
    to_options: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> Listed:
    """A row for `run_listed`: what it sets, and the command line's word for the rest.

    Args:
        given: the command's parameters.
        to_options: from these to the options of `run`.
    """
    try:
        if isinstance(line.fields, LowvramError):
            raise line.fields
        _check_once(line.fields)
        fields = {_plain(name): value for name, value in line.fields.items()}
        own = {name: fields.pop(name) for name in _OWN if fields.get(name) not in (None, "")}
        fields = {name: value for name, value in fields.items() if name not in _OWN}
        sets = parameters_of(fields, known)
        options = to_options({**given, **dict.fromkeys(others_of(sets)), **sets})
        return Listed(
            Row(**{k: v for k, v in options.items() if k not in SHARED + REFINING}, **own),  # type: ignore[typeddict-item]
            line.number,
        )
    except LowvramError as error:
        return Listed(error, line.number)


def _check_once(names: Iterable[str]) -> None:
    """Refuse a field that a row says twice, also where it is spelt in two ways."""
    seen: dict[str, str] = {}
    for name in names:
        if (plain := _plain(name)) in seen:
            both = "" if seen[plain] == name else f", as {seen[plain]!r} too"
            raise RequestError(f"a row says {name!r} twice{both}: say it once")
        seen[plain] = name


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """What a JSON object says, each name once."""
    _check_once([name for name, _ in pairs])
    return dict(pairs)


def _read(name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"--prompts {name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RequestError(
            f"--prompts {name} is not UTF-8 (line {line}): save it as such"
        ) from None


def _look(text: str) -> str:
    """The ending that a text would have as a file."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if first.startswith("{"):
        return ".jsonl"
    delimited = any("prompt" in map(_plain, first.split(mark)) for mark in _DELIMITERS)
    return ".csv" if delimited else ".txt"


def _text_lines(text: str) -> Iterator[Line]:
    """A prompt a line; lines that begin with # are comments, with \\# prompts that begin so."""
    for number, line in enumerate(text.splitlines(), 1):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            yield Line(number, {"prompt": re.sub(r"^\\#", "#", prompt)})


def _csv_lines(name: str, text: str, known: Mapping[str, Field]) -> Iterator[Line]:
    header = text.splitlines()[0] if text.strip() else ""
    counts = {
        mark: len(set(map(_plain, header.split(mark))) & {*_OWN, *known}) for mark in _DELIMITERS
    }
    mark = max(_DELIMITERS, key=lambda mark: counts[mark])
    # Strict, or a quote that is never closed would take the rest of the list for one cell.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    number = 1
    titles: list[str] = []
    for cells in _rows(name, reader):
        begins, number = number, reader.line_num + 1
        if not titles:
            titles = [_plain(cell) for cell in cells]
            _check_titles(name, titles, known)
        elif len(cells) > len(titles) and any(cells[len(titles) :]):
            too_many = RequestError(
                f"{len(cells)} cells for {len(titles)} columns: put a prompt with commas in quotes"
            )
            yield Line(begins, too_many)
        elif any(cell.strip() for cell in cells):
            yield Line(begins, {t: c.strip() for t, c in zip(titles, cells, strict=False)})


def _rows(name: str, reader: Any) -> Iterator[list[str]]:
    begins = 1
    try:
        for cells in reader:
            yield cells
            begins = reader.line_num + 1
    except csv.Error as error:
        raise RequestError(
            f"--prompts {name}, line {begins}: {error}: close each quote, and write a "
            'quote inside of quotes twice ("")'
        ) from None


def _check_titles(name: str, titles: Sequence[str], known: Mapping[str, Field]) -> None:
    for title in titles:
        if title not in known and title not in _OWN:
            names = ", ".join(sorted({*_OWN, *known}))
            raise RequestError(f"--prompts {name} has a column {title!r}: use {names}")
    if "prompt" not in titles or len(set(titles)) < len(titles):
        raise RequestError(f"--prompts {name} needs a header with a column prompt, each once")


def _json_lines(text: str) -> Iterator[Line]:
    # Not splitlines(): JSON may hold other line separators in its texts.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_object)
        except RequestError as error:
            yield Line(number, error)
            continue
        except (ValueError, RecursionError):
            yield Line(number, RequestError(f"{line.strip()[:40]!r} is not JSON: an object a line"))
            continue
        value = {"prompt": value} if isinstance(value, str) else value
        if not isinstance(value, dict):
            value = RequestError(f'{line.strip()[:40]!r} is no object: {{"prompt": "a red fox"}}')
        yield Line(number, value)


def _as(kind: Any, name: str, value: Any) -> Any:
    """A value of a row as an option takes it."""
    if kind is bool:
        said = str(value).strip().lower()
        if said not in _TRUE + _FALSE:
            raise RequestError(f"{name} {value!r} is neither true nor false")
        return said in _TRUE
    if isinstance(value, bool | dict):
        raise RequestError(f"{name} {value!r} makes no sense: write it as on the command line")
    if isinstance(value, list):  # "seed": [1, 2] is --seed 1,2
        value = ",".join(map(str, value))
    if kind in (int, float):
        try:
            return kind(value if isinstance(value, str) or kind is float else str(value))
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise RequestError(f"{name} {value!r} is not {what}") from None
    return kind(str(value))


def _without_none(kind: Any) -> Any:
    """`str | None` to `str`."""
    if isinstance(kind, UnionType):
        return next(each for each in get_args(kind) if each is not type(None))
    return kind


def _plain(name: str) -> str:
    """ "--Max-Tokens" and "max_tokens" are one."""
    return name.strip().lower().removeprefix("--").replace("-", "_")
