"""Types of the arrays that volumes are, and two small operations on them that many rooms need."""

import numpy as np
import numpy.typing as npt

Volume = npt.NDArray[np.float32]
"""(X, Y, Z) intensities."""

Mask = npt.NDArray[np.bool_]
"""(X, Y, Z), True inside."""

Affine = npt.NDArray[np.float64]
"""(4, 4), voxel indices to RAS millimetres."""

Box = tuple[slice, ...]
"""A slice for each axis."""


def bounding_box(mask: npt.NDArray[np.generic], margin: int = 0) -> Box:
    """Smallest box around the voxels of a mask that are not 0, wider by `margin` where the volume allows.

    Raises:
        ValueError: the mask is empty.
    """
    axes = range(mask.ndim)
    spans = [np.flatnonzero(mask.any(axis=tuple(other for other in axes if other != axis))) for axis in axes]
    if any(span.size == 0 for span in spans):
        raise ValueError("the mask is empty")
    return tuple(slice(max(0, int(span[0]) - margin), int(span[-1]) + margin + 1) for span in spans)


def block_means(volume: npt.NDArray[np.floating], n: int) -> Volume:
    """Means of blocks of n³ voxels, (..., X, Y, Z) -> (..., X // n, Y // n, Z // n); what is left over is cut off."""
    x, y, z = (length // n for length in volume.shape[-3:])
    even = volume[..., : x * n, : y * n, : z * n]
    means: Volume = even.reshape(*volume.shape[:-3], x, n, y, n, z, n).mean((-5, -3, -1))
    return means
