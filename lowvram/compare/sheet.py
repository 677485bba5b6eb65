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
from lowvram.compare.table import decibels, near_one

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    from lowvram.compare.comparison import Compared, Comparison

MOST_ROWS = 24  # of pictures: those that differ most, where there are more
SMALLEST_CELL, LARGEST_CELL = 192, 384  # px, the longer side of a picture on the sheet
_GAP, _LINE, _TEXT = 12, 18, 14  # px: between cells, of a line of text, of its letters
_MARGIN = 24
_SIDE = 190  # px, the column of prompts
_PAPER, _INK, _SOFT = (255, 255, 255), (20, 20, 24), (105, 105, 115)
_WITHIN = 0.999  # of a column's differences that must not exceed white


def draw(comparison: "Comparison") -> bytes:
    """The sheet as PNG."""
    rows = [row for row in comparison.rows if not row.failed]
    failed = [f"{row.variant.name}: {row.failed}" for row in comparison.rows if row.failed]
    shown = which(rows, len(comparison.items))
    sheet = _Sheet(comparison, rows, shown, failed)
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


def factor(differences: Sequence[np.ndarray]) -> int:
    """By what a column's differences are multiplied to be seen: 1, 2, 4, … 128.

    Args:
        differences: in levels, of each picture of the column.
    """
    largest = max((float(np.quantile(each, _WITHIN)) for each in differences), default=0.0)
    largest = largest or max((float(each.max()) for each in differences), default=0.0)
    fits = [2**power for power in range(8) if 2**power * largest <= 255]
    return fits[-1] if fits else 1


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
            max(SMALLEST_CELL // 2, round(first["width"] * self.scale)),
            max(1, round(first["height"] * self.scale)),
        )
        self.column = max(self.cell[0], SMALLEST_CELL)
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
        references = [self._levels(self.rows[0], index) for index in self.shown]
        for column, row in enumerate(self.rows):
            left = _MARGIN + _SIDE + column * (self.column + _GAP)
            levels = [self._levels(row, index) for index in self.shown]
            maps = [
                np.abs(each.astype(np.int16) - reference).astype(np.uint8)
                for each, reference in zip(levels, references, strict=True)
            ]
            times = factor(maps)
            equal = not any(each.any() for each in maps)
            title = _fitting(row.variant.name, bold, self.column)
            pen.text((left, _MARGIN), title, _INK, bold)
            below = self._below_title(column, row, times, equal)
            pen.text((left, _MARGIN + _LINE), below, _SOFT, font)
            for line, (each, difference) in enumerate(zip(levels, maps, strict=True)):
                top = self.head + line * self.block
                paper.paste(self._shown(each), (left, top))
                numbers = self._numbers(row, self.shown[line])
                pen.text((left, top + self.cell[1] + 2), numbers, _INK, font)
                if column and difference.any():
                    seen = np.minimum(difference.astype(np.uint16) * times, 255).astype(np.uint8)
                    paper.paste(self._shown(seen), (left, top + self.cell[1] + _LINE + _GAP))
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

    def _below_title(self, column: int, row: "Compared", times: int, equal: bool) -> str:
        if column == 0:
            return _fitting(
                ", ".join(row.variant.options.values()), _font("DejaVuSans"), self.column
            )
        return "equal" if equal else f"difference × {times}"

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

    def _shown(self, levels: np.ndarray) -> "Image.Image":
        from PIL import Image

        picture = Image.fromarray(levels)
        kind = Image.Resampling.NEAREST if self.scale >= 1 else Image.Resampling.BOX
        return picture.resize(self.cell, kind)


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
