"""Volumes and rigid movements between NumPy and SimpleITK.

Arrays are (X, Y, Z) with RAS affines, as everywhere in the package; SimpleITK's images and all movements here are in
LPS millimetres. A movement is a (4, 4) matrix that takes points of the fixed image to points of the moving one, which
is the direction that resampling needs.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cwdm.arrays import Affine, Mask, Volume
from cwdm.errors import CwdmError, needs_extra
from cwdm.files import write_atomically
from cwdm.images import Image
from cwdm.scans.volume import RAS_LPS

with needs_extra("scans", "SimpleITK"):
    import SimpleITK as sitk

__all__ = [
    "RAS_LPS",
    "Matrix",
    "ShearError",
    "covered",
    "grid",
    "inverse_of",
    "read_transform",
    "resample",
    "resample_mask",
    "sitk",
    "to_itk",
    "to_matrix",
    "to_transform",
    "to_volume",
    "write_transform",
]

Matrix = npt.NDArray[np.float64]
"""(4, 4) rigid movement, LPS mm of the fixed image to LPS mm of the moving one."""

_MOST_SHEAR = 0.01
"""Deviation of the axes from right angles that rounding in headers explains; gantry tilt is ten times as much."""


class ShearError(CwdmError):
    """Voxels are not rectangular boxes."""


def to_itk(volume: npt.NDArray[np.generic], affine: Affine) -> sitk.Image:
    """An image with its place in space; masks become 0 and 1.

    Raises:
        ShearError: the axes of the affine are not at right angles, as with gantry tilt.
    """
    voxels = volume.astype(np.uint8) if volume.dtype == np.bool_ else volume
    image = sitk.GetImageFromArray(voxels.transpose(2, 1, 0))
    lps = RAS_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    u, _, vh = np.linalg.svd(lps[:3, :3] / spacing)
    direction = u @ vh
    if (shear := float(np.abs(lps[:3, :3] / spacing - direction).max())) > _MOST_SHEAR:
        raise ShearError(
            f"the axes of the volume are not at right angles (off by {shear:.3f}), as after a gantry tilt; "
            "resample it to a rectangular grid first"
        )
    image.SetSpacing(spacing.tolist())
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def to_volume(image: sitk.Image) -> Volume:
    """(X, Y, Z) float32 of an image."""
    volume: Volume = np.asarray(sitk.GetArrayFromImage(image), np.float32).transpose(2, 1, 0)
    return volume


def grid(shape: Sequence[int], affine: Affine) -> sitk.Image:
    """An empty image of a shape and place, to resample onto."""
    return to_itk(np.broadcast_to(np.uint8(0), tuple(shape)), affine)


def to_transform(matrix: Matrix) -> sitk.Euler3DTransform:
    """The movement as SimpleITK takes it."""
    transform = sitk.Euler3DTransform()
    u, _, vh = np.linalg.svd(matrix[:3, :3])  # products of many rotations drift away from rotations
    transform.SetMatrix((u @ vh).ravel().tolist())
    transform.SetTranslation(matrix[:3, 3].tolist())
    return transform


def to_matrix(transform: sitk.Transform) -> Matrix:
    """(4, 4) of a linear transform, read off where it takes the origin and the axes."""
    origin = np.asarray(transform.TransformPoint((0.0, 0.0, 0.0)))
    matrix = np.eye(4)
    for axis in range(3):
        point = [0.0, 0.0, 0.0]
        point[axis] = 1.0
        matrix[:3, axis] = np.asarray(transform.TransformPoint(point)) - origin
    matrix[:3, 3] = origin
    return matrix


def inverse_of(matrix: Matrix) -> Matrix:
    """The movement the other way."""
    return np.asarray(np.linalg.inv(matrix), np.float64)


def resample(
    volume: npt.NDArray[np.generic], affine: Affine, shape: Sequence[int], onto: Affine, matrix: Matrix
) -> Volume:
    """A volume on another grid, by one cubic B-spline interpolation that leaves its range of intensities nowhere.

    Args:
        volume: (X, Y, Z), with its affine.
        shape, onto: the grid to fill; 0 where the volume does not reach.
        matrix: points of that grid to points of the volume.
    """
    moving = sitk.Cast(to_itk(volume, affine), sitk.sitkFloat32)
    moved = sitk.Resample(moving, grid(shape, onto), to_transform(matrix), sitk.sitkBSpline, 0.0, sitk.sitkFloat32)
    low, high = float(volume.min()), float(volume.max())
    clipped: Volume = np.clip(to_volume(moved), min(low, 0.0), max(high, 0.0))
    return clipped


def resample_mask(mask: Mask, affine: Affine, shape: Sequence[int], onto: Affine, matrix: Matrix) -> Mask:
    """A mask on another grid: where linear interpolation gives at least a half."""
    moving = sitk.Cast(to_itk(mask, affine), sitk.sitkFloat32)
    moved = sitk.Resample(moving, grid(shape, onto), to_transform(matrix), sitk.sitkLinear, 0.0, sitk.sitkFloat32)
    inside: Mask = to_volume(moved) >= np.float32(0.5)
    return inside


def covered(image: Image, shape: Sequence[int], onto: Affine, matrix: Matrix) -> Mask:
    """Where the field of view of an image reaches on another grid."""
    return resample_mask(np.ones(image.volume.shape, np.bool_), image.affine, shape, onto, matrix)


def write_transform(path: Path, matrix: Matrix) -> None:
    """Write a movement as an ITK text file, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    transform = to_transform(matrix)
    numbers = ([f"{value:.17g}" for value in values] for values in (transform.GetParameters(), (0.0,) * 4))
    parameters, fixed = (" ".join(values) for values in numbers)
    text = (
        "#Insight Transform File V1.0\n#Transform 0\nTransform: Euler3DTransform_double_3_3\n"
        f"Parameters: {parameters}\nFixedParameters: {fixed}\n"
    )
    write_atomically(path, lambda file: file.write(text.encode()))


def read_transform(path: Path) -> Matrix:
    """(4, 4) of a linear transform in an ITK file."""
    return to_matrix(sitk.ReadTransform(str(path)))
