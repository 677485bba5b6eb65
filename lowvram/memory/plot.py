"""The charts of a run as one picture for a document: PNG or SVG, drawn by matplotlib.

Never touches a display, nor a program's own matplotlib settings.
"""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowvram.memory.chart import COLOURS, PHASES, Chart, chart, title
from lowvram.memory.report import readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "svg")
_INCHES = (9.0, 3.4)  # of each stage
_DPI = 150


def plot(stages: Sequence[Mapping[str, Any]], kind: str) -> bytes:
    """One chart below the other.

    Args:
        stages: of a report as `report_files.read` gives it.
        kind: one of `FORMATS`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # A fixed salt and no date: the same report gives the same bytes.
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with rc_context({"svg.hashsalt": "lowvram"}):
        figure = Figure(
            figsize=(_INCHES[0], _INCHES[1] * max(1, len(stages))), layout="constrained"
        )
        for index, stage in enumerate(stages):
            _draw(figure.add_subplot(len(stages), 1, index + 1), chart(stage))
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=_DPI, metadata=metadata)
    return buffer.getvalue()


def _draw(axes: "Axes", drawn: Chart) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.set_title(drawn.stage, loc="left", fontweight="bold", pad=20, parse_math=False)
    axes.set_xlim(0, drawn.seconds)
    axes.set_ylim(0, drawn.top)
    axes.set_xlabel("seconds")
    unit, name = (1e9, "GB") if drawn.top >= 1e9 else (1e6, "MB")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g} {name}"))
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    for line in drawn.lines:
        seconds, values = zip(*line.points, strict=True)
        label = f"{title(line.name)}, at most {readable('_bytes', line.top)} seen"
        axes.plot(seconds, values, color=COLOURS[line.name][0], label=label)
    for level in drawn.levels:
        style = "--" if level.name == "budget" else ":"
        label = f"{level.title} {readable('_bytes', level.bytes)}"
        axes.axhline(level.bytes, color=COLOURS[level.name][0], linestyle=style, label=label)
    for level in drawn.above:
        label = f"{level.title} {readable('_bytes', level.bytes)} (above the chart)"
        axes.plot([], [], color=COLOURS[level.name][0], linestyle="--", label=label)
    _draw_marks(axes, drawn)
    if drawn.lines:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize="small", frameon=False)
    else:
        axes.text(0.5, 0.5, "this report has no timeline", transform=axes.transAxes, ha="center")


def _draw_marks(axes: "Axes", drawn: Chart) -> None:
    """Phases as lines over the whole height with their names, steps as short ones at the foot."""
    last = -drawn.seconds
    for seconds, name in drawn.marks:
        is_phase = name in PHASES
        axes.axvline(
            seconds, ymax=1.0 if is_phase else 0.04, color="#666666", linewidth=0.8, zorder=0
        )
        if is_phase and seconds - last >= 0.12 * drawn.seconds:
            axes.annotate(
                name,
                (seconds, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize="small",
                color="#666666",
                parse_math=False,
            )
            last = seconds
