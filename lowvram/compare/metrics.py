"""How far embeddings, latents and pictures are from a reference: plain functions on numpy arrays.

Everything is computed in float64. Equal arrays give exactly 0, 1 and infinity.
"""

import math

import numpy as np

LEVELS = 255  # the largest level of a picture
_SIGMA = 1.5  # px, of SSIM's window, with 11 x 11 px: both as in the paper
_RADIUS = 5
_C1, _C2 = (0.01 * LEVELS) ** 2, (0.03 * LEVELS) ** 2


def cosines(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The cosine of the angle between each two rows.

    Args:
        reference, other: `[tokens, channels]`.

    Returns:
        `[tokens]`; 1 for equal rows, also where both are zero.
    """
    a, b = reference.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found = np.divide((a * b).sum(axis=1), lengths, out=np.zeros(len(a)), where=lengths > 0)
    return np.where((a == b).all(axis=1), 1.0, np.clip(found, -1.0, 1.0))


def relative_errors(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The length of the difference of each two rows, as a part of the reference's.

    Args:
        reference, other: `[rows, …]`; what follows the first dimension is one vector.

    Returns:
        `[rows]`; 0 for equal rows, infinity where only the reference is zero.
    """
    a = reference.astype(np.float64).reshape(len(reference), -1)
    difference = np.linalg.norm(other.astype(np.float64).reshape(a.shape) - a, axis=1)
    lengths = np.linalg.norm(a, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / lengths)


def mean_squared_error(reference: np.ndarray, other: np.ndarray) -> float:
    """Of two pictures of one shape, in squared levels."""
    return float(np.square(other.astype(np.float64) - reference.astype(np.float64)).mean())


def psnr(squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB, of a mean squared error in squared levels.

    Of several pictures give the mean of theirs: a mean of decibels would be infinite as soon as
    one picture is equal.

    Returns:
        infinity for 0.
    """
    return math.inf if squared_error == 0 else 10 * math.log10(LEVELS**2 / squared_error)


def ssim(reference: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity, the mean over all windows and channels; 1 for equal pictures.

    Wang, Bovik, Sheikh, Simoncelli: Image Quality Assessment: From Error Visibility to Structural
    Similarity, IEEE TIP 13(4), 2004: Gaussian windows of 11 x 11 px with sigma 1.5 that lie wholly
    inside, K1 = 0.01, K2 = 0.03. scikit-image gives the same with `gaussian_weights=True`,
    `use_sample_covariance=False` and `channel_axis=-1`.

    Args:
        reference, other: `[height, width, channels]`, uint8, no side shorter than 11 px.

    Raises:
        ValueError: a side is shorter.
    """
    if min(reference.shape[:2]) <= 2 * _RADIUS:
        raise ValueError(f"a picture of {reference.shape[1]}x{reference.shape[0]} px is too small")
    channels = range(reference.shape[2])
    return float(np.mean([_ssim(reference[..., c], other[..., c]) for c in channels]))


def _ssim(reference: np.ndarray, other: np.ndarray) -> float:
    """Of one channel, `[height, width]`."""
    a, b = reference.astype(np.float64), other.astype(np.float64)
    mean_a, mean_b = _windows(a), _windows(b)
    variance_a = _windows(a * a) - mean_a**2
    variance_b = _windows(b * b) - mean_b**2
    covariance = _windows(a * b) - mean_a * mean_b
    alike = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    spread = (mean_a**2 + mean_b**2 + _C1) * (variance_a + variance_b + _C2)
    return float((alike / spread).mean())


def _windows(values: np.ndarray) -> np.ndarray:
    """The weighted mean of each window, `[height - 10, width - 10]`."""
    weights = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
    weights /= weights.sum()
    for _ in range(2):  # rows, then columns
        length = len(values) - 2 * _RADIUS
        parts = (w * values[i : i + length] for i, w in enumerate(weights))
        values = np.asarray(sum(parts)).T
    return values
