"""A glioma on the lattice: tumour, the tissue that it pushes aside, and oedema that spreads in white matter."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cwdm.arrays import bounding_box
from cwdm.phantoms.brain import deep_grey, pial_distance
from cwdm.phantoms.grids import LATTICE_MM, Floats, smooth_noise
from cwdm.phantoms.shapes import ellipsoid, steepness
from cwdm.phantoms.variation import Range


def grow_tumour(
    rng: np.random.Generator, p: Floats, cerebrum: Floats, radius_range_mm: Range
) -> tuple[Floats, Floats, Floats]:
    """Distance to the tumour, thickness of its enhancing rim, and where each point lay before the tumour grew."""
    radius = rng.uniform(*radius_range_mm)
    # Somewhere in a hemisphere, clear of the midline and of the surface.
    room = (-cerebrum > 0.6 * radius + 5) & (abs(p[0]) > 0.6 * radius + 5) & (p[2] > -22)
    sites = np.argwhere(room)
    site = sites[rng.integers(len(sites))]
    centre = [float(axis[tuple(site)]) for axis in p]
    before = _mass_effect(p, -cerebrum, centre, rng.uniform(0.3, 0.75) * radius)
    tumour = ellipsoid(p, centre, (radius * rng.uniform(0.75, 1.15, 3)).tolist())
    tumour = tumour + 0.22 * radius * smooth_noise(rng, 14.0) + 1.5 * smooth_noise(rng, 6.0)
    rim = rng.uniform(1.0, 3.5) * (1 + 0.8 * smooth_noise(rng, 7.0))
    return np.maximum(tumour, 2 + cerebrum), rim, before


def _mass_effect(p: Floats, depth: Floats, centre: Sequence[float], radius_mm: float) -> Floats:
    """Where each point lay before a ball of tissue of `radius_mm` grew at `centre`; the skull does not move."""
    offset = np.stack([axis - c for axis, c in zip(p, centre, strict=True)])
    r = np.sqrt((offset**2).sum(0)) + 1e-3
    before = np.cbrt(np.maximum(r**3 - radius_mm**3 * np.exp(-((r / (3 * radius_mm)) ** 2)), 0))
    return p + offset * ((before / r - 1) * np.clip(depth / 12, 0, 1))


def conduction(fields: Mapping[str, Floats]) -> NDArray[np.float64]:
    """How well fluid spreads, 0 to 1: in white matter, hardly in its dense tracts, in deep grey matter or below it."""
    white = np.clip(pial_distance(fields) - fields["cortex"], 0, 1)
    white = white * np.clip(fields["lateral"], 0, 1) * np.clip(fields["third"], 0, 1)
    below = np.minimum(fields["stem"], fields["cerebellum"]) < 2
    return np.where(deep_grey(fields) < 1, 0.05, np.where(below | (fields["callosum"] < 0), 0.3, 1)) * white


def spreading_oedema(tumour: Floats, conduction: NDArray[np.float64], reach_mm: float) -> Floats:
    """Signed distance (negative inside) of fluid that seeps from the tumour where tissue conducts it.

    Diffusion confined to the conducting tissue runs along white matter and around ventricles and sulci.
    """
    box = bounding_box(tumour < reach_mm + 16)
    source, open_ = tumour[box] < 0, conduction[box]
    fluid = source.astype(np.float32)
    for _ in range(round(3 * reach_mm / LATTICE_MM)):
        fluid = np.where(source, 1, open_ * ndimage.gaussian_filter(fluid, 0.8, truncate=2.5))
    level = np.log(np.maximum(fluid, 1e-30))
    radius = np.cbrt(3 / (4 * np.pi) * source.sum() * LATTICE_MM**3)
    wanted = 0.3 * 4 / 3 * np.pi * ((radius + reach_mm) ** 3 - radius**3) / LATTICE_MM**3
    ranked = np.sort(level[(open_ > 0.5) & ~source])[::-1]
    edge = max(ranked[min(int(wanted), len(ranked) - 1)], -25.0)
    distance = np.full(tumour.shape, 20, np.float32)
    distance[box] = np.clip((edge - level) / np.maximum(steepness(level), 0.05), -20, 20)
    return distance
