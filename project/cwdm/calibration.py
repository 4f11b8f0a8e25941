"""An error map against the errors: is a predicted standard deviation as large as they are, and where they are?

Both are compared over voxels of the brain, in any units that they share. Of normal errors, 68 % are within one standard
deviation; where a map says so of 50 %, it is too small by the same factor everywhere or wrong in more than its scale,
and only the rank correlation tells these apart.
"""

import math

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

Values = npt.NDArray[np.floating]

ONE_STD = math.erf(1 / math.sqrt(2))
"""Share of a normal distribution within one standard deviation of its mean: 68.27 %."""


def calibration_factor(error: Values, std: Values) -> float:
    """The factor by which a standard deviation is multiplied to hold 68.27 % of the errors.

    It is that quantile of |error| / std (split conformal prediction with a scaled score: Lei et al., J Am Stat Assoc
    113:1094, 2018), which a few voxels that are far off do not change.

    Args:
        error: of the mean, of either sign, (N,) or any other shape.
        std: predicted for the same voxels, greater than 0.

    Raises:
        ValueError: shapes differ, there is no voxel, a value is not finite or a standard deviation not positive.
    """
    if error.shape != std.shape or not error.size:
        raise ValueError(f"expected as many errors as standard deviations, found {error.shape} and {std.shape}")
    ratio = np.abs(error).astype(np.float64) / np.where(std > 0, std, np.nan)
    if not np.isfinite(ratio).all():
        raise ValueError("expected finite errors, and finite standard deviations greater than 0")
    return float(np.quantile(ratio, ONE_STD))


def coverage(error: Values, std: Values) -> float:
    """Share of the voxels whose error is within one standard deviation; 0.68 where that is calibrated."""
    return float(np.mean(np.abs(error) <= std))


def rank_correlation(error: Values, std: Values) -> float:
    """Spearman's, of the standard deviation and the absolute error: 0, it tells nothing; 1, it ranks every voxel."""
    if not (np.ptp(std) and np.ptp(np.abs(error))):
        return 0.0
    return float(spearmanr(std.ravel(), np.abs(error).ravel()).statistic)
