"""Pictures as tensors, and many pictures on one sheet."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> [3, height, width] in -1..1."""
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)
    return (pixels / 127.5 - 1).contiguous()


def from_tensor(pixels: Tensor) -> Image.Image:
    """[3, height, width] in -1..1 -> RGB picture."""
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def sheet(pictures: list[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size in rows of `columns`, two px apart."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    paper = Image.new("RGB", (columns * (width + 2), rows * (height + 2)), "grey")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        paper.paste(picture, (column * (width + 2), row * (height + 2)))
    return paper
