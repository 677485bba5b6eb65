"""All pictures of a comparison on one sheet, with amplified difference maps below them.

A row for each prompt and seed, a column for each variant. Under a picture lies the absolute
difference from the reference's, times a factor that stands above its column: a power of two, chosen
so that nearly all of the column's differences stay within white.
"""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowvram.compare.differences import PictureDifference, read_levels
from lowvram.compare.metrics import LEVELS
from lowvram.compare.table import decibels, failures, near_one

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    from lowvram.compare.comparison import Compared, Comparison

MOST_ROWS = 24  # of pictures: those that differ most, where there are more
SMALLEST_CELL, LARGEST_CELL = 192, 384  # px, the longer side of a picture on the sheet
_GAP, _LINE, _TEXT = 12, 18, 14  # px: between cells, of a line of text, of its letters
_MARGIN = 24
_SIDE = 190  # px, the column of prompts
_LEAST_COLUMN = 220  # px, for what is written below a picture
_PAPER, _INK, _SOFT = (255, 255, 255), (20, 20, 24), (105, 105, 115)
_RULE = (205, 205, 212)
_WITHIN = 0.999  # of a column's differences that must not exceed white


def draw(comparison: "Comparison") -> bytes:
    """The sheet as PNG."""
    rows = [row for row in comparison.rows if not row.failed]
    shown = which(rows, len(comparison.items))
    sheet = _Sheet(comparison, rows, shown, failures(comparison))
    buffer = io.BytesIO()
    sheet.paint().save(buffer, "PNG")
    return buffer.getvalue()


def which(rows: "Sequence[Compared]", count: int) -> list[int]:
    """The pictures that are shown, by index: all, or those that differ most, in order."""

    def worst(index: int) -> float:
        return min(
            (row.pictures.pictures[index].psnr for row in rows if row.pictures is not None),
            default=0.0,
        )

    return sorted(sorted(range(count), key=worst)[:MOST_ROWS])


def factor(counts: np.ndarray) -> int:
    """By what a column's differences are multiplied to be seen: 1, 2, 4, … 128.

    Args:
        counts: `[256]`, how often each difference occurs in the column, in levels.
    """
    within = int(np.searchsorted(counts.cumsum(), _WITHIN * counts.sum()))
    largest = within or int(counts.nonzero()[0].max(initial=0))
    fits = [2**power for power in range(8) if 2**power * largest <= LEVELS]
    return fits[-1]


class _Sheet:
    """Where everything lies. Sizes in px."""

    def __init__(
        self,
        comparison: "Comparison",
        rows: "Sequence[Compared]",
        shown: Sequence[int],
        failed: Sequence[str],
    ) -> None:
        first = comparison.items[0]
        self.comparison, self.rows, self.shown = comparison, rows, shown
        longer = max(first["width"], first["height"])
        side = min(LARGEST_CELL, longer * max(1, round(SMALLEST_CELL / longer)))
        self.scale = side / longer
        self.cell = (
            max(1, round(first["width"] * self.scale)),
            max(1, round(first["height"] * self.scale)),
        )
        self.column = max(self.cell[0], _LEAST_COLUMN)
        self.width = 2 * _MARGIN + _SIDE + len(rows) * (self.column + _GAP)
        letters = (self.width - 2 * _MARGIN) // 8
        self.footer = [line for text in [self._says(), *failed] for line in _wrap(text, letters, 4)]
        self.head = _MARGIN + 3 * _LINE
        self.block = 2 * self.cell[1] + 2 * _LINE + 2 * _GAP
        below = len(self.footer) * _LINE + 2 * _MARGIN
        self.height = self.head + len(shown) * self.block + below

    def paint(self) -> "Image.Image":
        from PIL import Image, ImageDraw

        paper = Image.new("RGB", (self.width, self.height), _PAPER)
        pen, font, bold = ImageDraw.Draw(paper), _font("DejaVuSans"), _font("DejaVuSans-Bold")
        self._prompts(pen, font)
        for column, row in enumerate(self.rows):
            self._column(paper, pen, (font, bold), column, row)
        for line, text in enumerate(self.footer):
            top = self.height - _MARGIN - (len(self.footer) - line) * _LINE
            pen.text((_MARGIN, top), text, _SOFT, font)
        return paper

    def _prompts(self, pen: "ImageDraw.ImageDraw", font: "ImageFont.FreeTypeFont") -> None:
        for line, index in enumerate(self.shown):
            item = self.comparison.items[index]
            top = self.head + line * self.block
            room = max(2, 2 * self.cell[1] // _LINE - 1)
            texts = _wrap(item["prompt"], (_SIDE - _GAP) // 8, room)
            pen.multiline_text((_MARGIN, top), "\n".join(texts), _INK, font, spacing=4)
            below = top + (len(texts) + 0.5) * _LINE
            pen.text((_MARGIN, below), f"seed {item['seed']}", _SOFT, font)

    def _column(
        self,
        paper: "Image.Image",
        pen: "ImageDraw.ImageDraw",
        fonts: "tuple[ImageFont.FreeTypeFont, ImageFont.FreeTypeFont]",
        column: int,
        row: "Compared",
    ) -> None:
        """A variant's pictures, and below each its difference from the reference's."""
        font, bold = fonts
        left = _MARGIN + _SIDE + column * (self.column + _GAP)
        counts = np.zeros(LEVELS + 1, dtype=np.int64)
        for index in self.shown:
            counts += np.bincount(self._difference(row, index).ravel(), minlength=LEVELS + 1)
        times = factor(counts)
        below = f"difference × {times}" if counts[1:].any() else "equal"
        if column == 0:
            below = row.variant.title.partition(": ")[2]
        pen.text((left, _MARGIN), _fitting(row.variant.name, bold, self.column), _INK, bold)
        pen.text((left, _MARGIN + _LINE), _fitting(below, font, self.column), _SOFT, font)
        for line, index in enumerate(self.shown):
            top = self.head + line * self.block
            self._paste(paper, pen, self._levels(row, index), (left, top))
            pen.text((left, top + self.cell[1] + 3), self._numbers(row, index), _INK, font)
            difference = self._difference(row, index)
            if difference.any():
                seen = np.minimum(difference.astype(np.uint16) * times, LEVELS).astype(np.uint8)
                self._paste(paper, pen, seen, (left, top + self.cell[1] + _LINE + _GAP))

    def _numbers(self, row: "Compared", index: int) -> str:
        if row.variant.name == "reference":
            return ""
        one = None if row.pictures is None else row.pictures.pictures[index]
        return caption(one)

    def _says(self) -> str:
        pictures = len(self.comparison.items)
        left = f"; {len(self.shown)} of {pictures} pictures, those that differ most" if len(
            self.shown) < pictures else ""  # fmt: skip
        return (
            f"{self.comparison.model}, pictures shown × {self.scale:.2g}{left}. Below each picture "
            "its absolute difference from the reference's, times the factor above the column."
        )

    def _levels(self, row: "Compared", index: int) -> np.ndarray:
        assert row.files is not None  # it did not fail
        return read_levels(Path(row.files["pictures"][index]))

    def _difference(self, row: "Compared", index: int) -> np.ndarray:
        """Absolute, in levels."""
        reference = self._levels(self.rows[0], index)
        if row is self.rows[0]:
            return np.zeros_like(reference)
        return np.abs(self._levels(row, index).astype(np.int16) - reference).astype(np.uint8)

    def _paste(
        self,
        paper: "Image.Image",
        pen: "ImageDraw.ImageDraw",
        levels: np.ndarray,
        place: tuple[int, int],
    ) -> None:
        """A picture in a thin frame, so that a white one has an edge."""
        from PIL import Image

        picture = Image.fromarray(levels)
        kind = Image.Resampling.NEAREST if self.scale >= 1 else Image.Resampling.BOX
        paper.paste(picture.resize(self.cell, kind), place)
        right, bottom = place[0] + self.cell[0], place[1] + self.cell[1]
        pen.rectangle((place[0] - 1, place[1] - 1, right, bottom), outline=_RULE)


def caption(one: PictureDifference | None) -> str:
    """What stands below a picture."""
    if one is None or one.largest == 0:
        return "equal"
    return f"{decibels(one.psnr)}, SSIM {near_one(one.ssim)}"


def _wrap(text: str, letters: int, lines: int) -> list[str]:
    return textwrap.wrap(text, letters, max_lines=lines, placeholder=" …") or [""]


def _fitting(text: str, font: Any, width: int) -> str:
    """The text, cut where it is wider."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _font(name: str) -> "ImageFont.FreeTypeFont":
    """DejaVu, which matplotlib brings: Latin, Greek and Cyrillic letters."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(
        Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"), _TEXT
    )
