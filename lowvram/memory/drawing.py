"""A stage's chart as inline SVG, for a page that colours it (see `page.STYLE`)."""

from collections.abc import Sequence
from html import escape

from lowvram.memory.chart import PHASES, Chart, Line, ticks
from lowvram.memory.report import readable

_WIDTH, _HEIGHT, _DISK_HEIGHT = 720, 312, 132
# Room for labels at the size that they have on a phone, see `page.STYLE`.
_LEFT, _RIGHT, _TOP, _BOTTOM = 96, 14, 30, 48


def memory_svg(chart: Chart) -> str:
    """Memory over time with levels and marks."""
    frame = _Frame(chart.seconds, chart.top, _HEIGHT)
    parts = [*frame.axes(), *_marks(chart, frame)]
    for level in chart.levels:
        y = frame.y(level.bytes)
        told = escape(f"{level.title} {readable('_bytes', level.bytes)}")
        parts.append(
            f'<line class="level {level.name}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" '
            f'y2="{y:.1f}"><title>{told}</title></line>'
        )
    parts += [_polyline(line, frame) for line in chart.lines]
    return frame.svg(f"Memory of {chart.stage} over time", parts)


def disk_svg(chart: Chart, disk: Line) -> str:
    """Bytes read so far over time."""
    frame = _Frame(chart.seconds, disk.top * 1.08, _DISK_HEIGHT)
    parts = [*frame.axes(about=2), _polyline(disk, frame)]
    return frame.svg(f"Bytes that {chart.stage} read from disk over time", parts)


class _Frame:
    """Where seconds and bytes lie in a picture of fixed size."""

    def __init__(self, seconds: float, top: float, height: int) -> None:
        self.seconds, self.top, self.height = seconds, top, height

    def x(self, seconds: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * min(max(seconds / self.seconds, 0.0), 1.0)

    def y(self, value: float) -> float:
        room = self.height - _TOP - _BOTTOM
        return self.height - _BOTTOM - room * min(max(value / self.top, 0.0), 1.0)

    def axes(self, about: int = 5) -> list[str]:
        """Grid lines and labels."""
        parts = []
        for value in ticks(self.top, about):
            y = self.y(value)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" '
                f'y2="{y:.1f}"/><text class="end" x="{_LEFT - 8}" y="{y + 5:.1f}">'
                f"{_short_bytes(value, self.top)}</text>"
            )
        for seconds in ticks(self.seconds):
            anchor = "end" if self.x(seconds) > _WIDTH - 3 * _RIGHT else "middle"
            parts.append(
                f'<text class="{anchor}" x="{self.x(seconds):.1f}" y="{self.height - 14}">'
                f"{seconds:g} s</text>"
            )
        return parts

    def svg(self, label: str, parts: Sequence[str]) -> str:
        """The whole element."""
        return (
            f'<svg viewBox="0 0 {_WIDTH} {self.height}" role="img" '
            f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
        )


def _marks(chart: Chart, frame: _Frame) -> list[str]:
    """Phases as labelled lines over the whole height, steps as short ones at the foot."""
    parts, free_from = [], 0.0
    foot = frame.height - _BOTTOM
    for seconds, name in chart.marks:
        x = frame.x(seconds)
        is_phase = name in PHASES
        kind, top = ("phase", _TOP - 6) if is_phase else ("step", foot - 9)
        parts.append(
            f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{foot}">'
            f"<title>{escape(name)}: {seconds:.2f} s</title></line>"
        )
        if is_phase and x >= free_from:
            anchor = "end" if x > _WIDTH - 110 else "middle"
            parts.append(f'<text class="{anchor}" x="{x:.1f}" y="18">{escape(name)}</text>')
            free_from = x + 110  # the width of a label and its neighbour's half, on a phone
    return parts


def _polyline(line: Line, frame: _Frame) -> str:
    points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line.points)
    return f'<polyline class="line {line.name}" points="{points}"/>'


def _short_bytes(value: float, top: float) -> str:
    """As short as the axis allows."""
    unit, name = (1e9, "GB") if top >= 1e9 else (1e6, "MB") if top >= 1e6 else (1e3, "kB")
    return f"{value / unit:g} {name}"
