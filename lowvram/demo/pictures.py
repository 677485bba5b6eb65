"""Pictures as tensors, and many pictures on one sheet."""

import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def from_tensor(pixels: Tensor) -> Image.Image:
    """[3, height, width] in -1..1 -> RGB picture."""
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def decibels(made: Tensor, drawn: Tensor) -> Tensor:
    """PSNR of pictures [batch, 3, height, width] in -1..1, as an 8-bit file cuts them; [batch]."""
    error = (made.clamp(-1, 1) - drawn) / 2
    return -10 * error.square().mean(dim=(1, 2, 3)).log10()


def sheet(pictures: list[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size in rows of `columns`, two px apart."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    paper = Image.new("RGB", (columns * (width + 2), rows * (height + 2)), "grey")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        paper.paste(picture, (column * (width + 2), row * (height + 2)))
    return paper


def captioned(
    pictures: Sequence[Image.Image], texts: Sequence[str], columns: int, scale: int = 1
) -> Image.Image:
    """Pictures of any sizes in rows of `columns`, `scale` times as large, a text below each."""
    gap, letter = 6 * scale, 6 + 6 * scale
    font, line = ImageFont.load_default(letter), int(letter * 1.3)
    cell = scale * max(picture.width for picture in pictures)
    letters = int(1.1 * cell / font.getlength("n"))
    lines = [[said for part in text.split("\n") for said in textwrap.wrap(part, letters)]
             for text in texts]  # fmt: skip
    rows = [slice(first, first + columns) for first in range(0, len(pictures), columns)]
    tallest = [scale * max(picture.height for picture in pictures[row]) for row in rows]
    heights = [
        tall + line * max(len(said) for said in lines[row]) + 3 * gap
        for tall, row in zip(tallest, rows, strict=True)
    ]
    paper = Image.new("RGB", (columns * (cell + 2 * gap), sum(heights)), "white")
    pen, top = ImageDraw.Draw(paper), gap
    for row, tall, height in zip(rows, tallest, heights, strict=True):
        for column, (picture, said) in enumerate(zip(pictures[row], lines[row], strict=True)):
            width, own = (scale * side for side in picture.size)
            left = column * (cell + 2 * gap) + gap + (cell - width) // 2
            low = top + tall - own
            paper.paste(picture.resize((width, own), Image.Resampling.NEAREST), (left, low))
            pen.rectangle((left - 1, low - 1, left + width, low + own), outline="lightgrey")
            for index, words in enumerate(said):
                at = left + (width - font.getlength(words)) / 2
                pen.text((at, top + tall + gap // 2 + index * line), words, "black", font)
        top += height
    return paper
