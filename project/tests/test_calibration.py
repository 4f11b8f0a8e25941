"""An error map against errors of which everything is known."""

import numpy as np
import pytest

from cwdm.calibration import ONE_STD, calibration_factor, coverage, rank_correlation


@pytest.fixture
def std() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.02, 0.3, (40, 50, 30)).astype(np.float32)


@pytest.mark.parametrize("scale", [0.4, 1.0, 1.7])
def test_the_factor_of_normal_errors_is_their_scale(std: np.ndarray, scale: float) -> None:
    error = np.random.default_rng(1).normal(0, scale * std)
    assert calibration_factor(error, std) == pytest.approx(scale, rel=0.02)
    assert coverage(error, calibration_factor(error, std) * std) == pytest.approx(ONE_STD, abs=1e-4)
    far = np.where(np.random.default_rng(2).random(std.shape) < 0.005, 100, error)  # a few voxels change it little
    assert calibration_factor(far, std) == pytest.approx(scale, rel=0.04)


def test_ranks_are_of_absolute_errors(std: np.ndarray) -> None:
    sign = np.where(np.random.default_rng(3).random(std.shape) < 0.5, -1, 1)
    assert rank_correlation(sign * std**2, std) == pytest.approx(1)
    assert abs(rank_correlation(np.random.default_rng(4).normal(size=std.shape), std)) < 0.02
    assert rank_correlation(std, np.full_like(std, 0.1)) == 0


def test_what_has_no_factor_is_refused(std: np.ndarray) -> None:
    for error, bad in ((std[1:], std), (std[:0], std[:0])):
        with pytest.raises(ValueError, match="as many errors"):
            calibration_factor(error, bad)
    for bad in (np.where(std < 0.1, 0, std), np.where(std < 0.1, np.nan, std)):
        with pytest.raises(ValueError, match="greater than 0"):
            calibration_factor(std, bad)
