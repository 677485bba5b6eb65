"""The sizes that PixArt models were trained on: bins, one for each aspect ratio.

Those of diffusers' four tables, `ASPECT_RATIO_256_BIN` and so on.
"""

BINNED = (32, 64, 128, 256)  # `sample_size` of the transformers that have a table

# Aspect ratio (height / width) to height and width in 1/16 of the model's side: the sizes of the
# 256, 512 and 1024 px models, and what the 2K model has besides.
_BINS = {
    0.25: (8, 32), 0.28: (8, 29), 0.32: (9, 28), 0.33: (9, 27), 0.35: (9, 26), 0.4: (10, 25),
    0.42: (10, 24), 0.48: (11, 23), 0.5: (11, 22), 0.52: (11, 21), 0.57: (12, 21), 0.6: (12, 20),
    0.68: (13, 19), 0.72: (13, 18), 0.78: (14, 18), 0.82: (14, 17), 0.88: (15, 17), 0.94: (15, 16),
    1.0: (16, 16), 1.07: (16, 15), 1.13: (17, 15), 1.21: (17, 14), 1.29: (18, 14), 1.38: (18, 13),
    1.46: (19, 13), 1.67: (20, 12), 1.75: (21, 12), 2.0: (22, 11), 2.09: (23, 11), 2.4: (24, 10),
    2.5: (25, 10), 3.0: (27, 9), 4.0: (32, 8),
}  # fmt: skip
_BINS_2K = {
    0.26: (8, 31), 0.27: (8, 30), 2.89: (26, 9), 3.11: (28, 9), 3.62: (29, 8), 3.75: (30, 8),
    3.88: (31, 8),
}  # fmt: skip


def bins(cells: int) -> dict[float, tuple[int, int]]:
    """Height and width in px by aspect ratio (height / width), for a `sample_size` of `BINNED`."""
    table = _BINS | (_BINS_2K if cells == 256 else {})
    unit = cells * 8 // 16
    return {ratio: (h * unit, w * unit) for ratio, (h, w) in sorted(table.items())}


def nearest_bin(cells: int, width: int, height: int) -> tuple[int, int]:
    """Width and height in px of the bin whose aspect ratio is nearest, the first of two as near."""
    known = bins(cells)
    bin_height, bin_width = known[min(known, key=lambda ratio: abs(ratio - height / width))]
    return bin_width, bin_height
