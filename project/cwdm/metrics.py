"""Metrics of a synthesised volume against the true one; arrays and numbers only.

SSIM is that of Wang et al. (2004), equation 13, with a Gaussian window of 1.5 voxels (11×11×11), population
covariances, k1 = 0.01 and k2 = 0.03: what scikit-image (`gaussian_weights=True`), MONAI and torchmetrics compute.
Windows that reach beyond the volume see it mirrored there; all three leave them out of the mean (`interior`), but for
torchmetrics since version 1.4.2.
With another window, uniform of 7×7×7 voxels and with sample covariances, it is scikit-image's default, which the
SynthRAD challenges score synthetic CT by.
SSIM is computed in float64, and only in the box that needs it: where both volumes are 0 throughout a window, it is 1.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter, uniform_filter

from cwdm.arrays import Box, Mask, Volume, bounding_box

BRASYN_PERCENTILES = (0.5, 99.5)

_K1, _K2 = 0.01, 0.03


@dataclass(frozen=True)
class SsimWindow:
    """What SSIM takes its means over.

    Attributes:
        radius: in voxels; the window is a cube.
        sigma: standard deviation in voxels of a Gaussian; None for equal weights.
        sample: whether covariances are those of a sample (n − 1) instead of a population.
    """

    radius: int
    sigma: float | None
    sample: bool

    def mean(self, volume: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The mean around each voxel of a volume that is mirrored at its sides."""
        mean: npt.NDArray[np.float64]
        if self.sigma is None:
            mean = uniform_filter(volume, 2 * self.radius + 1, mode="mirror")
        else:
            mean = gaussian_filter(volume, self.sigma, radius=self.radius, mode="mirror")
        return mean

    @property
    def correction(self) -> float:
        """What a population's covariance is multiplied by."""
        voxels = (2 * self.radius + 1) ** 3
        return voxels / (voxels - 1) if self.sample else 1.0


GAUSSIAN = SsimWindow(radius=5, sigma=1.5, sample=False)  # the radius is 3.5 standard deviations, rounded
UNIFORM = SsimWindow(radius=3, sigma=None, sample=True)


def mse(prediction: Volume, truth: Volume, mask: Mask) -> float:
    """Mean squared error inside a mask, for volumes (X, Y, Z) of one unit.

    Raises:
        ValueError: the mask is empty.
    """
    return float(np.mean(np.square(_difference(prediction, truth, mask))))


def mae(prediction: Volume, truth: Volume, mask: Mask) -> float:
    """Mean absolute error inside a mask, for volumes (X, Y, Z) of one unit.

    Raises:
        ValueError: the mask is empty.
    """
    return float(np.mean(np.abs(_difference(prediction, truth, mask))))


def psnr(prediction: Volume, truth: Volume, mask: Mask, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB inside a mask, for volumes (X, Y, Z) of one unit; infinite if they are equal.

    Args:
        data_range: the largest possible difference of two intensities.

    Raises:
        ValueError: the mask is empty.
    """
    error = mse(prediction, truth, mask)
    return float("inf") if error == 0 else float(20 * np.log10(data_range) - 10 * np.log10(error))


def ssim(
    prediction: Volume, truth: Volume, mask: Mask, data_range: float = 1.0, window: SsimWindow = GAUSSIAN
) -> float:
    """Structural similarity, mean over the voxels of a mask, for volumes (X, Y, Z); see the module.

    The windows of voxels at the mask's rim reach beyond it, into what is there.

    Args:
        data_range: the largest possible difference of two intensities.

    Raises:
        ValueError: the mask is empty, or the range is not a positive number.
    """
    voxels = np.count_nonzero(mask)
    if not voxels:
        raise ValueError("the mask is empty")
    if not 0 < data_range < np.inf:
        raise ValueError(f"the range of intensities should be a positive number, found {data_range:g}")
    occupied = (prediction != 0) | (truth != 0)
    if not occupied.any():
        return 1.0
    # One voxel more than the radius: what is mirrored at the box's sides must be zeros, as beyond them.
    box = _intersection(bounding_box(mask, window.radius), bounding_box(occupied, window.radius + 1))
    inside = mask[box]
    values = _ssim_map(prediction[box], truth[box], data_range, window)[inside] if inside.any() else np.zeros(0)
    # Each voxel that is left sees nothing but zeros in both volumes.
    return float((values.sum() + voxels - values.size) / voxels)


def interior(shape: tuple[int, ...], window: SsimWindow = GAUSSIAN) -> Mask:
    """All voxels whose SSIM window lies inside the volume, which those programs take the mean over (see the module).

    Raises:
        ValueError: there is none.
    """
    radius = window.radius
    if min(shape) <= 2 * radius:
        found = "×".join(map(str, shape))
        raise ValueError(f"SSIM needs at least {2 * radius + 1} voxels along each axis, found {found}")
    mask = np.zeros(shape, np.bool_)
    mask[(slice(radius, -radius),) * len(shape)] = True
    return mask


def value_range(volumes: Iterable[Volume]) -> float:
    """The largest span of intensities among volumes, torchmetrics' range where none is given."""
    return max(float(volume.max()) - float(volume.min()) for volume in volumes)


def brasyn_unit(volume: Volume) -> Volume:
    """Clip to the 0.5 and 99.5 percentiles of the whole volume, the lower at least 0, and map them to [0, 1].

    As in the challenge's published script (hongweilibran/BraSyn, ssim.py), where each image is scaled by its own.

    Raises:
        ValueError: the percentiles are equal.
    """
    low, high = np.percentile(volume, BRASYN_PERCENTILES)
    low = max(low, 0.0)
    if not high > low:
        raise ValueError(f"99 % of the voxels are {low:g}, so there is nothing to scale; check that it is complete")
    return ((np.clip(volume, low, high) - low) / (high - low)).astype(np.float32)


def brasyn_ssim(prediction: Volume, truth: Volume, mask: Mask) -> float:
    """SSIM of a region as in the challenge's published script: all else set to 0, mean over the region.

    Args:
        prediction, truth: (X, Y, Z), each scaled by `brasyn_unit`.
        mask: the tumour, or everything else.

    Raises:
        ValueError: the mask is empty, or both volumes are constant once all else is 0.
    """
    prediction, truth = prediction * mask, truth * mask
    return ssim(prediction, truth, mask, value_range((prediction, truth)))


def _intersection(a: Box, b: Box) -> Box:
    """Of two boxes; empty along an axis where they do not meet."""
    starts_stops = [(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True)]
    return tuple(slice(start, max(start, stop)) for start, stop in starts_stops)


def _difference(prediction: Volume, truth: Volume, mask: Mask) -> npt.NDArray[np.float64]:
    if not mask.any():
        raise ValueError("the mask is empty")
    return prediction[mask].astype(np.float64) - truth[mask]


def _ssim_map(prediction: Volume, truth: Volume, data_range: float, window: SsimWindow) -> npt.NDArray[np.float64]:
    x, y = prediction.astype(np.float64) / data_range, truth.astype(np.float64) / data_range
    c1, c2 = _K1**2, _K2**2  # the intensities were divided by the range
    mean_x, mean_y = window.mean(x), window.mean(y)
    squares, product = mean_x**2 + mean_y**2, mean_x * mean_y
    # The sum of both variances is all that the formula takes.
    variances = window.correction * (window.mean(x**2 + y**2) - squares)
    covariance = window.correction * (window.mean(x * y) - product)
    values: npt.NDArray[np.float64] = (2 * product + c1) * (2 * covariance + c2)
    values /= (squares + c1) * (variances + c2)
    return values
