"""A comparison as one HTML page that needs nothing else: both tables, and the sheet."""

import base64
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from lowvram.compare.table import failures, far, heading, notes, took
from lowvram.memory.page import html

if TYPE_CHECKING:
    from lowvram.compare.comparison import Comparison


def page(comparison: "Comparison", sheet: bytes) -> str:
    """The whole page; every text in it is escaped.

    Args:
        sheet: as PNG.
    """
    rows = [row for row in comparison.rows if not row.failed]
    reference, about = heading(comparison)
    prompts = dict.fromkeys(str(item["prompt"]) for item in comparison.items)
    image = base64.b64encode(sheet).decode()
    body = [
        f"<h1>{escape(reference)}</h1>",
        f'<p class="soft">{escape(about)}</p>{_list(list(prompts))}',
        f"<section><h2>How far</h2>{_table(far(rows), 2)}{_list(notes(comparison))}</section>",
        f"<section><h2>What it took</h2>{_table(took(rows), 1)}{_list(failures(comparison))}"
        "</section>",
        f'<div class="wide"><img src="data:image/png;base64,{image}" style="max-width: none" '
        'alt="All pictures, and below each how it differs from the reference\'s."></div>',
    ]
    return html(f"Compared: {about}", body)


def _table(lines: Sequence[Sequence[str]], titles: int) -> str:
    """The first lines are titles."""
    body = [
        f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in line)}</tr>"
        for index, line in enumerate(lines)
        for tag in ("th" if index < titles else "td",)
    ]
    return f'<div class="wide"><table>{"".join(body)}</table></div>'


def _list(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="soft">{items}</ul>' if lines else ""
