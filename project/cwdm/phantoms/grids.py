"""The lattice on which patients are made, the voxels that they are carried to, and smooth random fields."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from cwdm.arrays import Box

Floats = NDArray[np.float32]
Shape = tuple[int, int, int]

LATTICE_MM = 2.5
LATTICE_LIMITS_MM = ((-84, 84), (-116, 84), (-74, 88))
AC_FROM_CENTRE_MM = (0.0, 14.0, -7.0)  # anterior commissure from the centre of the array, where SRI24 has it


SPLINE_STD = np.float32(0.479**1.5)
"""Of a sum of B-splines with normal weights; 0.479: squares of those that overlap at a point, averaged over points."""


class Interpolation:
    """Carries volumes from one grid to another by a sparse matrix along each axis, (new points, old points).

    Sparse, not BLAS: nearly all entries are zero, and BLAS threads suffer where cores are shared.
    """

    def __init__(self, x: Floats, y: Floats, z: Floats) -> None:
        self.shape = len(x), len(y), len(z)
        self.rows = sparse.kron(sparse.csr_array(x), sparse.csr_array(y), format="csr")
        self.columns = sparse.csr_array(z)

    def __call__(self, volume: Floats) -> Floats:
        planes = self.columns @ volume.reshape(-1, volume.shape[2]).T
        return (self.rows @ np.ascontiguousarray(planes.T)).reshape(self.shape)


def linear(points: Floats, knots: Floats) -> Floats:
    """Matrix (points, knots) of linear interpolation, widened to an average where points are sparser."""
    width = max(abs(knots[1] - knots[0]), abs(points[1] - points[0]))
    weights = np.maximum(0, 1 - abs(points[:, None] - knots) / width)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def box_average(centres: Floats, size_mm: float, points: Floats, spacing_mm: float) -> Floats:
    """Matrix (centres, points) of averages over boxes, of a volume that is 0 beyond the voxels at its points."""
    overlap = (size_mm + spacing_mm) / 2 - abs(centres[:, None] - points)
    return (np.clip(overlap, 0, min(size_mm, spacing_mm)) / size_mm).astype(np.float32)


def _cubic(points: Floats, knots: NDArray[np.floating]) -> Floats:
    """Matrix (points, knots) of cubic B-splines."""
    t = abs(points[:, None] - knots) / (knots[1] - knots[0])
    inner, outer = 2 / 3 - t**2 + t**3 / 2, np.maximum(2 - t, 0) ** 3 / 6
    return np.where(t < 1, inner, outer).astype(np.float32)


@dataclass(frozen=True)
class Grid:
    """The voxels that matter: a box of the array around the brain, and in it those near the brain.

    Attributes:
        array_shape: (X, Y, Z) of the whole array.
        box: where in the array the box lies.
        spacing_mm: edge of a voxel.
        near: flat indices into the box.
        from_lattice: carries lattice fields to the box.
    """

    array_shape: Shape
    box: Box
    spacing_mm: float
    near: NDArray[np.intp]
    from_lattice: Interpolation

    def sample(self, field: Floats) -> Floats:
        """Interpolate a lattice field at the voxels `near`."""
        return self.from_lattice(field).ravel()[self.near]

    def axis_mm(self, axis: int) -> Floats:
        """Position of the box's voxels along an axis, mm from the anterior commissure."""
        return voxel_axes(self.array_shape, self.spacing_mm)[axis][self.box[axis]]

    def volume(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values at the voxels `near` as a volume over the box, 0 elsewhere."""
        volume = np.zeros(self.from_lattice.shape, values.dtype)
        volume.ravel()[self.near] = values
        return volume

    def embed(self, volume: NDArray[Any]) -> NDArray[Any]:
        """A volume over the box as one over the whole array, 0 elsewhere."""
        array = np.zeros(self.array_shape, volume.dtype)
        array[self.box] = volume
        return array


def grid_around(brain: Floats, shape: Shape, spacing_mm: float) -> Grid:
    """The box of voxels up to a few millimetres outside the brain, so that blurring sees what lies there."""
    margin = max(4.0, spacing_mm)
    box, matrices = [], []
    for k, (axis, knots) in enumerate(zip(voxel_axes(shape, spacing_mm), lattice_axes(), strict=True)):
        reached = knots[(brain < margin).any(tuple({0, 1, 2} - {k}))]
        hit = np.flatnonzero((axis >= reached[0]) & (axis <= reached[-1]))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
        matrices.append(linear(axis[box[-1]], knots))
    from_lattice = Interpolation(*matrices)
    near = np.flatnonzero(from_lattice(brain) < margin)
    return Grid(shape, tuple(box), spacing_mm, near, from_lattice)


def voxel_axes(shape: Shape, spacing_mm: float) -> list[Floats]:
    """Position of every voxel along the three array axes, mm from the anterior commissure, y forward."""
    return [
        ((np.arange(n) - (n - 1) / 2) * spacing_mm * sign - ac).astype(np.float32)
        for n, sign, ac in zip(shape, (1, -1, 1), AC_FROM_CENTRE_MM, strict=True)
    ]


@cache
def lattice_axes() -> tuple[Floats, ...]:
    a, b, c = (np.arange(lo, hi + LATTICE_MM, LATTICE_MM, dtype=np.float32) for lo, hi in LATTICE_LIMITS_MM)
    return a, b, c


@cache
def _spline_to_lattice(scale_mm: float) -> tuple[tuple[int, ...], Interpolation]:
    """Number of B-splines `scale_mm` apart along each axis of the lattice, and their sum on the lattice."""
    knots = [np.arange(lo - 2 * scale_mm, hi + 3 * scale_mm, scale_mm) for lo, hi in LATTICE_LIMITS_MM]
    matrices = [_cubic(axis, k) for axis, k in zip(lattice_axes(), knots, strict=True)]
    return tuple(len(k) for k in knots), Interpolation(*matrices)


def smooth_noise(rng: np.random.Generator, scale_mm: float) -> Floats:
    """Gaussian field on the lattice with unit variance and no detail below `scale_mm`."""
    splines, to_lattice = _spline_to_lattice(scale_mm)
    return to_lattice(rng.standard_normal(splines, np.float32)) / SPLINE_STD


def smooth_field(
    shape: Sequence[int], spacing_mm: Sequence[float] | NDArray[np.float64], scale_mm: float, rng: np.random.Generator
) -> Floats:
    """Gaussian field (X, Y, Z) of mean 0 and unit variance with no detail below `scale_mm`, on any grid."""
    bases = []
    for length, mm, phase in zip(shape, spacing_mm, rng.random(3), strict=True):
        points = (np.arange(length) * mm).astype(np.float32)
        numbers = np.arange(-2, points[-1] // scale_mm + 4)
        bases.append(_cubic(points, ((numbers + phase) * scale_mm).astype(np.float32)))
    field = rng.standard_normal([basis.shape[1] for basis in bases]).astype(np.float32)
    for axis, basis in enumerate(bases):
        field = along(field, basis, axis)
    return field / SPLINE_STD


def along(volume: Floats, matrix: Floats, axis: int) -> Floats:
    """A matrix (new, old) applied along one axis of a volume."""
    result: Floats = np.moveaxis(np.tensordot(matrix, volume, (1, axis)), 0, axis)
    return np.ascontiguousarray(result)


def gyral_noise(rng: np.random.Generator, p: Floats, wavelength_mm: float) -> Floats:
    """Band-limited Gaussian field at points p (3, ...): its zero sheets lie half a wavelength apart."""
    step, size = 3.0, 72
    k = np.fft.fftfreq(size, step)
    radius = np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + np.fft.rfftfreq(size, step) ** 2)
    ring = np.exp(-0.5 * ((radius * wavelength_mm - 1) / 0.38) ** 2)
    field = np.fft.irfftn(np.fft.rfftn(rng.standard_normal((size,) * 3)) * ring).astype(np.float32)
    # Without the prefilter the quadratic splines smooth a little, which is welcome here.
    return ndimage.map_coordinates(field / field.std(), p / step, order=2, mode="grid-wrap", prefilter=False)
