"""The formulas of a comparison, against other implementations and cases done by hand."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram.compare.metrics import cosines, mean_squared_error, psnr, relative_errors, ssim
from lowvram.compare.perceptual import flip

rng = np.random.default_rng(0)
NOISE = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
NOISIER = np.clip(NOISE + rng.normal(0, 9, NOISE.shape), 0, 255).round().astype(np.uint8)
SLOPE = np.add.outer(np.arange(40) * 3, np.arange(56) * 2)[..., None] + np.array([0, 10, 20])
SLOPE = SLOPE.astype(np.uint8)


@pytest.mark.parametrize(
    ("reference", "other", "expected"),
    [
        (NOISE, NOISIER, 0.9925588130024062),
        (SLOPE, np.roll(SLOPE, 3, axis=1), 0.9650982294038163),
    ],
)
def test_ssim_is_that_of_scikit_image(
    reference: np.ndarray, other: np.ndarray, expected: float
) -> None:
    """Computed once with scikit-image 0.26: structural_similarity(reference, other,
    gaussian_weights=True, use_sample_covariance=False, sigma=1.5, channel_axis=-1,
    data_range=255).
    """
    assert ssim(reference, other) == pytest.approx(expected, abs=1e-12)


def test_ssim_is_the_papers_formula_window_by_window() -> None:
    a, b = NOISE[:14, :13, :1], NOISIER[:14, :13, :1]
    axis = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(axis, axis) / axis.sum() ** 2
    found = []
    for top in range(4):
        for left in range(3):
            x, y = (p[top : top + 11, left : left + 11, 0].astype(float) for p in (a, b))
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            cov = (weights * (x - mx) * (y - my)).sum()
            c1, c2 = 2.55**2, 7.65**2
            found.append(
                (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
            )
    assert ssim(a, b) == pytest.approx(np.mean(found), abs=1e-10)


def test_psnr_is_that_of_scikit_image() -> None:
    assert psnr(mean_squared_error(NOISE, NOISIER)) == pytest.approx(29.20581767494475, abs=1e-9)


@pytest.mark.parametrize("step", [1, 2, 17])
def test_a_known_error_has_a_known_psnr(step: int) -> None:
    grey = np.full((20, 30, 3), 100, dtype=np.uint8)
    assert psnr(mean_squared_error(grey, grey + np.uint8(step))) == pytest.approx(
        20 * math.log10(255 / step)
    )


@pytest.mark.parametrize("sigma", [2.0, 8.0])
def test_a_known_noise_has_a_known_psnr(sigma: float) -> None:
    grey = np.full((256, 256, 3), 128, dtype=np.uint8)
    noisy = (grey + np.random.default_rng(1).normal(0, sigma, grey.shape)).round().astype(np.uint8)
    expected = 10 * math.log10(255**2 / (sigma**2 + 1 / 12))  # rounding adds its own noise
    assert psnr(mean_squared_error(grey, noisy)) == pytest.approx(expected, abs=0.05)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(11, 24), st.integers(11, 24))
def test_pictures_equal_themselves_and_differ_alike_both_ways(
    seed: int, height: int, width: int
) -> None:
    generator = np.random.default_rng(seed)
    a, b = generator.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    assert (psnr(mean_squared_error(a, a)), ssim(a, a)) == (math.inf, 1.0)
    assert mean_squared_error(a, b) == mean_squared_error(b, a)
    assert ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-12)
    assert -1 <= ssim(a, b) < 1


def test_ssim_needs_a_window() -> None:
    with pytest.raises(ValueError, match="64x10 px is too small"):
        ssim(NOISE[:10], NOISE[:10])


def test_rows_by_hand() -> None:
    reference = np.array([[3, 4], [1, 0], [1, 0], [2, 0], [0, 0], [0, 0]], dtype=np.float32)
    other = np.array([[3, 4], [0, 1], [-1, 0], [3, 0], [0, 0], [1, 0]], dtype=np.float32)
    assert cosines(reference, other).tolist() == [1, 0, -1, 1, 1, 0]
    assert relative_errors(reference, other).tolist() == [
        0,
        pytest.approx(math.sqrt(2)),
        2,
        0.5,
        0,
        math.inf,
    ]


def test_a_row_may_have_any_shape() -> None:
    reference = np.ones((2, 4, 3, 3))
    other = reference.copy()
    other[1] *= 1.25
    assert relative_errors(reference, other).tolist() == [0, pytest.approx(0.25)]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e-1))
def test_equal_rows_are_exactly_equal_and_small_errors_are_seen(seed: int, size: float) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.normal(0, 1, (3, 64))
    noise = generator.normal(0, 1, rows.shape)
    noise *= (
        size
        * np.linalg.norm(rows, axis=1, keepdims=True)
        / np.linalg.norm(noise, axis=1, keepdims=True)
    )
    assert cosines(rows, rows).tolist() == [1, 1, 1]
    assert relative_errors(rows, rows).tolist() == [0, 0, 0]
    assert relative_errors(rows, rows + noise) == pytest.approx([size] * 3, rel=1e-6)
    assert (cosines(rows, rows + noise) <= 1).all()


def test_flip_of_equal_and_of_opposite_pictures() -> None:
    pytest.importorskip("flip_evaluator")
    black = np.zeros((32, 32, 3), dtype=np.uint8)
    assert flip(NOISE, NOISE) == 0
    far, near = flip(black, black + np.uint8(255)), flip(NOISE, NOISIER)
    assert near is not None
    assert far is not None
    assert 0 < near < far <= 1


def test_flip_is_left_out_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flip_evaluator", None)
    assert flip(NOISE, NOISIER) is None
