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

    The box of an empty mask is empty.
    """
    box = []
    for axis, length in enumerate(mask.shape):
        inside = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        first, last = (int(inside[0]) - margin, int(inside[-1]) + margin) if inside.size else (0, -1)
        box.append(slice(max(0, first), min(last + 1, length)))
    return tuple(box)


def block_means(volume: npt.NDArray[np.generic], n: int) -> Volume:
    """Means of blocks of n³ voxels, (..., X, Y, Z) -> (..., X // n, Y // n, Z // n); what is left over is cut off."""
    x, y, z = (length // n for length in volume.shape[-3:])
    blocks = volume[..., : x * n, : y * n, : z * n].reshape(*volume.shape[:-3], x, n, y, n, z, n)
    means: Volume = blocks.mean((-5, -3, -1), dtype=np.float32)
    return means
