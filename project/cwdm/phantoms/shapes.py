"""Signed distances in millimetres, negative inside: of shapes, of their unions and of sheets."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from cwdm.phantoms.grids import LATTICE_MM, Floats


def ellipsoid(p: Floats, centre: Sequence[float], radii: Sequence[float], power: float = 2) -> Floats:
    """Distance to an ellipsoid, first-order (exact on its surface); p is (3, ...). Power > 2 makes it boxy."""
    q = [abs(axis - c) / r for axis, c, r in zip(p, centre, radii, strict=True)]
    length = (q[0] ** power + q[1] ** power + q[2] ** power) ** (1 / power) + 1e-3
    slope = [(axis / length) ** (power - 1) / r for axis, r in zip(q, radii, strict=True)]
    return (length - 1) / np.sqrt(slope[0] ** 2 + slope[1] ** 2 + slope[2] ** 2 + 1e-8)


def tube(p: Floats, knots: Sequence[tuple[float, float, float, float]]) -> Floats:
    """Distance to a chain of cones through knots (x, y, z, radius)."""
    distance = np.full(p.shape[1:], np.inf, np.float32)
    for start, end in pairwise(np.array(knots, np.float32)):
        along = (end - start)[:3]
        x, y, z = (axis - s for axis, s in zip(p, start[:3], strict=True))
        t = np.clip((x * along[0] + y * along[1] + z * along[2]) / (along @ along), 0, 1)
        square = (x - t * along[0]) ** 2 + (y - t * along[1]) ** 2 + (z - t * along[2]) ** 2
        distance = np.minimum(distance, np.sqrt(square) - start[3] - t * (end - start)[3])
    return distance


def smooth_min(a: Floats, b: Floats, width: Floats | float) -> Floats:
    """Union of two distances with a fillet of about `width` mm."""
    h = np.clip(0.5 + 0.5 * (b - a) / width, 0, 1)
    return b + h * (a - b) - width * h * (1 - h)


def excess_length(*excess: Floats) -> Floats:
    """Length of the vector whose components are the positive parts of `excess`."""
    return np.sqrt(sum(np.maximum(e, 0) ** 2 for e in excess))


def sheet(across: Floats, beyond: Floats) -> Floats:
    """Distance to a sheet that ends where `beyond`, the distance past its edge, turns positive."""
    return np.hypot(across, np.maximum(beyond, 0))


def steepness(field: Floats) -> Floats:
    """Length of the gradient of a lattice field, per mm."""
    return np.sqrt(sum(g**2 for g in np.gradient(field, LATTICE_MM)))
