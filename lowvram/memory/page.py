"""A run as one HTML page that needs nothing else: no network, script or font.

Every text of the report is escaped: a prompt is shown, never run.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lowvram.memory.chart import COLOURS, PHASES, Chart, Line, chart, title
from lowvram.memory.drawing import disk_svg, memory_svg
from lowvram.memory.report import cells, left_tensor, readable

_MOST_EMBEDDED_BYTES = 2 << 20  # a larger picture is shown smaller
_SMALLER_PX = 1024

# Nothing may be loaded: should an escape ever be forgotten, it stays text.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """\
:root { color-scheme: light dark; --ground: #fff; --text: #1b1b1f; --soft: #5c5c66;
  --rule: #d9d9e0; --card: #f6f6f9; LIGHT }
@media (prefers-color-scheme: dark) { :root { --ground: #141417; --text: #ececf1;
  --soft: #a5a5b0; --rule: #34343c; --card: #1e1e23; DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--ground);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 0 0 .5rem; }
section { background: var(--card); border-radius: .6rem; padding: 1rem; margin: 1rem 0; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 14rem; max-width: 28rem; }
img { max-width: 100%; height: auto; border-radius: .4rem; display: block; }
figcaption, .soft { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 500; text-align: left; }
ul { padding-left: 1.2rem; margin: .3rem 0; }
dl { display: grid; grid-template-columns: minmax(7rem, auto) 1fr; gap: .1rem 1rem; margin: 0;
  font-size: .9rem; } dt { color: var(--soft); } dd { margin: 0; }
summary { cursor: pointer; margin-top: .5rem; }
svg { width: 100%; height: auto; display: block; }
svg line, polyline { vector-effect: non-scaling-stroke; }
svg text { fill: var(--soft); font-size: 13px; } .middle { text-anchor: middle; }
.end { text-anchor: end; } .grid { stroke: var(--rule); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.level { stroke-width: 1.5; stroke-dasharray: 3 4; } .level.budget { stroke-dasharray: 10 5; }
.phase { stroke: var(--soft); stroke-width: 1; } .step { stroke: var(--soft); stroke-width: 1; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0;
  font-size: .9rem; } .legend svg { width: 1.6rem; height: .7rem; display: inline; }
@media (max-width: 40rem) { svg text { font-size: 22px; } body { padding: .6rem; }
  section { padding: .7rem; } }
"""


def page(document: Mapping[str, Any], folder: Path) -> str:
    """The whole page.

    Args:
        document: a report as `report_files.read` gives it.
        folder: where the report lies; a picture that has moved is looked for there too.
    """
    images, stages = document["images"], document["stages"]
    prompts = list(dict.fromkeys(str(image.get("prompt", "")) for image in images))
    heading = " · ".join(filter(None, prompts)) or "lowvram report"
    body = [
        f"<h1>{escape(heading)}</h1>",
        f'<div class="pictures">{"".join(_figure(image, folder) for image in images)}</div>',
        f"<section><h2>Memory and time</h2>{_table(stages)}{_totals(stages)}</section>",
        *(_stage(stage) for stage in stages),
    ]
    return html(heading, body)


def html(heading: str, body: Sequence[str]) -> str:
    """A whole page of these parts, in the look of all reports.

    Args:
        heading: plain text, for the window's title.
        body: HTML.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(heading[:80])}</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _style() -> str:
    variables = [
        " ".join(f"--{name}: {colours[dark]};" for name, colours in COLOURS.items())
        for dark in (0, 1)
    ]
    strokes = "".join(f".{name} {{ stroke: var(--{name}); }}\n" for name in COLOURS)
    return _STYLE.replace("LIGHT", variables[0]).replace("DARK", variables[1]) + strokes


def _figure(image: Mapping[str, Any], folder: Path) -> str:
    told = f"seed {image.get('seed')}, {image.get('width')} × {image.get('height')} px"
    source, note = _embedded(Path(str(image.get("path") or "")), folder)
    shown = (
        f'<img src="{source}" alt="{escape(str(image.get("prompt", "")))}">'
        if source
        else '<p class="soft">This picture is no longer there.</p>'
    )
    name = Path(str(image.get("path") or "")).name
    caption = " · ".join(filter(None, [str(image.get("prompt", "")), name, told, note]))
    return f"<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>"


def _embedded(path: Path, folder: Path) -> tuple[str, str]:
    """A picture as a data URI, "" where there is none, and a note about it."""
    try:
        found = next((each for each in (path, folder / path.name) if each.is_file()), None)
        if found is None:
            return "", ""
        data = found.read_bytes()
        if len(data) <= _MOST_EMBEDDED_BYTES and data.startswith(b"\x89PNG"):
            return f"data:image/png;base64,{base64.b64encode(data).decode()}", ""
        from PIL import Image

        with Image.open(io.BytesIO(data)) as picture:
            smaller = picture.convert("RGB")
        smaller.thumbnail((_SMALLER_PX, _SMALLER_PX))
        buffer = io.BytesIO()
        smaller.save(buffer, "JPEG", quality=90)
    except Exception:  # no permission, no picture, too many pixels: the report is shown without
        return "", ""
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", "shown smaller"


def _table(stages: Sequence[Mapping[str, Any]]) -> str:
    """A row for each number and a column for each stage: that fits a phone."""
    lines = [
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(each)}</td>' for each in values)}</tr>"
        for name, *values in zip(*cells(stages), strict=True)
    ]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _totals(stages: Sequence[Mapping[str, Any]]) -> str:
    total = sum(stage.get("seconds") or 0.0 for stage in stages)
    return f'<p class="soft">All stages together: {total:.1f} s.</p>'


def _stage(stage: Mapping[str, Any]) -> str:
    drawn = chart(stage)
    parts = [f"<h2>{escape(drawn.stage)} on {escape(str(stage.get('device')))}</h2>"]
    if drawn.lines:
        parts += [memory_svg(drawn), _legend(drawn)]
    else:
        parts.append('<p class="soft">This report has no timeline.</p>')
    if drawn.disk is not None:
        parts += [disk_svg(drawn, drawn.disk), f'<p class="soft">{_read(stage, drawn.disk)}</p>']
    parts += [_list("Why", stage.get("reasons") or []), _left(stage)]
    parts.append(_list("Not as it should be", stage.get("notes") or []))
    return (
        f"<section>{''.join(parts)}{_settings(stage.get('settings') or {})}{_marks(drawn)}"
        "</section>"
    )


def _read(stage: Mapping[str, Any], disk: Line) -> str:
    predicted = (stage.get("predicted") or {}).get("disk_read_bytes")
    foretold = "" if predicted is None else f" (predicted {readable('_bytes', predicted)})"
    # The line has what the stage read itself; its weights may have been read ahead for it.
    read = max(stage.get("disk_read_bytes") or 0, disk.top)
    return f"Read from disk: {readable('_bytes', read)}{foretold}."


def _legend(drawn: Chart) -> str:
    entries = [
        (f"line {line.name}", f"{title(line.name)}, at most {readable('_bytes', line.top)} seen")
        for line in drawn.lines
    ]
    for level in (*drawn.levels, *drawn.above):
        above = " (above the chart)" if level in drawn.above else ""
        entries.append(
            (f"level {level.name}", f"{level.title} {readable('_bytes', level.bytes)}{above}")
        )
    items = [
        f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><line class="{kind}" x1="0" x2="26" '
        f'y1="5" y2="5"/></svg> {escape(text)}</li>'
        for kind, text in entries
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _left(stage: Mapping[str, Any]) -> str:
    tensors = [left_tensor(each) for each in stage.get("left_tensors") or []]
    left = tensors or stage.get("left_behind") or []
    if left:
        return _list("Left behind after the release", left)
    return '<p class="soft">Nothing was left behind after the release.</p>'


def _list(heading: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<p>{escape(heading)}:</p><ul>{items}</ul>" if lines else ""


def _settings(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    pairs = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(_value(value))}</dd>"
        for name, value in settings.items()
    )
    return f"<details open><summary>Settings</summary><dl>{pairs}</dl></details>"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "none"
    return "none" if value in ("", None) else str(value)


def _marks(drawn: Chart) -> str:
    if not drawn.marks:
        return ""
    pairs = "".join(_mark_rows(drawn.marks))
    return f"<details><summary>When each step ended</summary><dl>{pairs}</dl></details>"


def _mark_rows(marks: Sequence[tuple[float, str]]) -> Iterator[str]:
    for seconds, name in marks:
        shown = f"<b>{escape(name)}</b>" if name in PHASES else escape(name)
        yield f"<dt>{shown}</dt><dd>{seconds:.2f} s</dd>"
