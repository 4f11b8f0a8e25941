"""Figures of merit of a synthesised volume against the true one."""

import numpy as np
import numpy.typing as npt
from skimage.metrics import structural_similarity

Volume = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


def psnr(prediction: Volume, truth: Volume, mask: Mask) -> float:
    """Peak signal-to-noise ratio in dB inside a mask, for volumes (X, Y, Z) in [0, 1]; infinite if they are equal.

    Raises:
        ValueError: the mask is empty.
    """
    if not mask.any():
        raise ValueError("the mask is empty")
    mse = np.mean(np.square(prediction[mask].astype(np.float64) - truth[mask]))
    return float("inf") if mse == 0 else float(-10 * np.log10(mse))


def ssim(prediction: Volume, truth: Volume, mask: Mask) -> float:
    """Structural similarity (Wang et al., 2004; Gaussian window of 1.5 voxels), mean inside a mask, range [0, 1].

    Raises:
        ValueError: the mask is empty.
    """
    if not mask.any():
        raise ValueError("the mask is empty")
    box = _bounding_box(mask, margin=6)  # the window's radius, so that the box changes nothing inside the mask
    _, values = structural_similarity(
        prediction[box].astype(np.float64),
        truth[box].astype(np.float64),
        data_range=1.0,
        gaussian_weights=True,
        use_sample_covariance=False,
        full=True,
    )
    return float(values[mask[box]].mean())


def _bounding_box(mask: Mask, margin: int) -> tuple[slice, ...]:
    occupied = np.argwhere(mask)
    first, last = occupied.min(axis=0), occupied.max(axis=0)
    return tuple(slice(max(0, a - margin), b + margin + 1) for a, b in zip(first, last, strict=True))
