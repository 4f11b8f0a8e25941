"""What scanners and preparation do to images, each a function of its own of volumes in which the background is 0.

Each leaves what it is given alone, and gives it back where its parameters mean nothing.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch.nn.functional import affine_grid, grid_sample

from cwdm.arrays import Mask, Volume
from cwdm.phantoms import along, box_average, linear, smooth_field
from cwdm.phantoms import noisy as noisy

Vector = Sequence[float] | npt.NDArray[np.float64]
Volumes = npt.NDArray[np.float32]

BIAS_MM = 50.0
"""Between the splines that a bias field is made of."""

MASK_MM = 20.0
"""Between the splines by which the error of a mask changes from place to place."""


def filled(volumes: Volumes, mask: Mask) -> Volumes:
    """Volumes (..., X, Y, Z) that go on beyond the brain as they end at its surface, so that its rim keeps bright."""
    if mask.all() or not mask.any():
        return volumes
    nearest = ndimage.distance_transform_cdt(~mask, return_distances=False, return_indices=True)
    result = volumes.copy()
    result[..., ~mask] = volumes[..., *nearest[:, ~mask]]
    return result


def moved(volume: Volume, rotation_deg: Vector, shift_mm: Vector, spacing_mm: Vector) -> Volume:
    """A volume (X, Y, Z) turned about its centre and shifted, by linear interpolation; its border goes on for ever.

    Args:
        rotation_deg: the axis that it is turned about, as long as the angle.
        shift_mm: along each axis.
    """
    if not (np.any(rotation_deg) or np.any(shift_mm)):
        return volume
    half = np.maximum((np.array(volume.shape) - 1) * spacing_mm / 2, 1e-6)  # torch counts from -1 to 1
    back = Rotation.from_rotvec(rotation_deg, degrees=True).as_matrix().T
    matrix = back * half / half[:, None]
    offset = -back @ shift_mm / half
    # And it counts the last axis first.
    theta = torch.from_numpy(np.hstack([matrix[::-1, ::-1], offset[::-1, None]]).astype(np.float32))
    grid = affine_grid(theta[None], [1, 1, *volume.shape], align_corners=True)
    image = torch.from_numpy(np.ascontiguousarray(volume))[None, None]
    found: Volume = grid_sample(image, grid, padding_mode="border", align_corners=True)[0, 0].numpy()
    return found


def thick_slices(volume: Volume, axis: int, slice_mm: float, spacing_mm: float, phase: float = 0.5) -> Volume:
    """A volume (X, Y, Z) as slices of `slice_mm` along an axis show it, each the mean of what it holds, resampled back.

    Args:
        spacing_mm: of its voxels along this axis; slices that are no thicker leave it as it is.
        phase: where the first slice begins, 0 to 1.
    """
    if slice_mm <= spacing_mm:
        return volume
    positions = (np.arange(volume.shape[axis]) * spacing_mm).astype(np.float32)
    numbers = np.arange(-2, positions[-1] // slice_mm + 3)
    centres = ((numbers + phase) * slice_mm).astype(np.float32)
    forth = box_average(centres, slice_mm, positions, spacing_mm)
    centres, forth = centres[forth.any(1)], forth[forth.any(1)]
    forth /= forth.sum(1, keepdims=True)
    back = linear(np.clip(positions, centres[0], centres[-1]), centres) if len(centres) > 1 else np.ones_like(forth.T)
    return along(volume, back @ forth, axis)


def biased(volume: Volume, strength: float, spacing_mm: Vector, rng: np.random.Generator) -> Volume:
    """A volume (X, Y, Z) as a coil that does not receive alike everywhere shows it.

    Args:
        strength: standard deviation of the field's logarithm.
    """
    if not strength:
        return volume
    field: Volume = np.exp(np.float32(strength) * smooth_field(volume.shape, spacing_mm, BIAS_MM, rng))
    return volume * field


def with_gamma(volume: Volume, exponent: float) -> Volume:
    """A volume (X, Y, Z) in which 0 and 1 stay and what is between becomes brighter (< 1) or darker (> 1)."""
    if exponent == 1:
        return volume
    result: Volume = np.maximum(volume, 0) ** np.float32(exponent)
    return result


def rescaled(volume: Volume, log_slopes: Vector) -> Volume:
    """A volume (X, Y, Z) with another scanner's scale: a rising line of several pieces, through 0 at 0 and 1 at 1.

    Args:
        log_slopes: natural logarithms of the slopes of the pieces, which are equally wide; beyond 1 the last goes on.
    """
    if not np.any(log_slopes):
        return volume
    steps = np.exp(log_slopes)
    steps /= steps.sum()
    curve = np.interp(volume, np.linspace(0, 1, len(steps) + 1), np.r_[0, np.cumsum(steps)])
    beyond = np.maximum(volume - 1, 0) * np.float32(steps[-1] * len(steps))
    return curve.astype(np.float32) + beyond


def another_mask(mask: Mask, offset_mm: float, spacing_mm: Vector, rng: np.random.Generator) -> Mask:
    """A brain mask (X, Y, Z) as another program would have drawn it.

    Args:
        offset_mm: that it is wider by, narrower where negative; from place to place a third of it more or less.
    """
    if not offset_mm or mask.all() or not mask.any():
        return mask
    width_mm = max(4 * abs(offset_mm), 3 * max(spacing_mm))
    size = [2 * int(width_mm / mm / 2) + 1 for mm in spacing_mm]
    # Across a surface the mean over a box rises evenly, by 1 over its width.
    inside = ndimage.uniform_filter(mask.astype(np.float32), size)
    offset = offset_mm * (1 + 0.3 * smooth_field(mask.shape, spacing_mm, MASK_MM, rng))
    moved: Mask = inside > 0.5 - offset / width_mm
    return mask | moved if offset_mm > 0 else mask & moved


def flipped(volumes: Volumes, axes: Sequence[int]) -> Volumes:
    """Volumes (..., X, Y, Z) with the order of some of the last three axes (0, 1, 2) reversed."""
    return np.ascontiguousarray(np.flip(volumes, tuple(axis - 3 for axis in axes)))
