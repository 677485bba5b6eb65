"""A perceptual distance, where a package for it is installed.

FLIP (Andersson et al.: FLIP: A Difference Evaluator for Alternating Images, HPG 2020) from its
authors' `flip-evaluator`: 0.4 MB, no weights, nothing downloaded. LPIPS and DISTS, the usual
others, fetch a network's weights when they are first used.
"""

import numpy as np

MISSING = 'FLIP not measured: pip install "lowvram[compare]"'


def flip(reference: np.ndarray, other: np.ndarray) -> float | None:
    """Mean FLIP error, 0 (equal) to 1, seen at 67 pixels per degree (the authors' default).

    Args:
        reference, other: `[height, width, 3]`, uint8, sRGB.

    Returns:
        None where the package is not installed.
    """
    try:
        from flip_evaluator import evaluate
    except ImportError:
        return None
    pictures = (each.astype(np.float32) / 255 for each in (reference, other))
    return float(evaluate(*pictures, "LDR", applyMagma=False)[1])
