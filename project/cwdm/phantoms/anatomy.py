"""The anatomy of a synthetic patient: a folded brain with a glioma, as layers of tissue on any voxel grid.

Every structure is a signed distance in millimetres, negative inside, computed on a fixed 2.5 mm lattice in
AC-centred coordinates (x left, y anterior, z superior) and interpolated to the voxels, so that the same random
numbers are the same brain at any resolution.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cwdm.arrays import Mask
from cwdm.phantoms.brain import fissure_sheets, folia_angle, head_coordinates, hull, nuclei, sulcal_distance
from cwdm.phantoms.grids import Floats, Grid, Shape, grid_around, smooth_noise
from cwdm.phantoms.layers import Layer, paint
from cwdm.phantoms.shapes import ellipsoid, sheet, smooth_min
from cwdm.phantoms.tumour import conduction, grow_tumour, spreading_oedema
from cwdm.phantoms.variation import Variation


@dataclass(frozen=True)
class Anatomy:
    """What a patient is made of, on the box of `grid`.

    Attributes:
        grid: where the brain is.
        mask: bool, the brain.
        layers: tissues from the bottom up, each over the ones before.
        seg: uint8: 1 necrotic core, 2 oedema, 3 enhancing tumour, 0 elsewhere.
    """

    grid: Grid
    mask: Mask
    layers: list[Layer]
    seg: NDArray[np.uint8]


def make_anatomy(rng: np.random.Generator, shape: Shape, spacing_mm: float, variation: Variation) -> Anatomy:
    """Draw a patient.

    Args:
        rng: decides everything about the patient, at any resolution.
        shape: (X, Y, Z) of the array in voxels, stored LPS; what of the brain does not fit in is cut off.
        spacing_mm: edge of the cubic voxels.
        variation: how far patients differ.
    """
    fields = _lattice_fields(rng, variation)
    grid = grid_around(fields["brain"], shape, spacing_mm)
    at = {name: grid.sample(field) for name, field in fields.items()}
    mask = grid.volume(at["brain"] < 0)
    layers, labels = paint(at, spacing_mm)
    return Anatomy(grid, mask, layers, grid.volume(labels) * mask)


def _lattice_fields(rng: np.random.Generator, variation: Variation) -> dict[str, Floats]:
    """All of a patient's geometry on the lattice: distances in mm, smooth enough to interpolate."""
    noise = partial(smooth_noise, rng)
    p = head_coordinates(rng, variation)
    cerebrum, cerebellum, stem = hull(p)
    cerebrum = cerebrum + 0.8 * noise(14.0)
    brain = smooth_min(smooth_min(cerebrum, cerebellum, 14), stem, 14)
    # How much of the fluid and membranes around the brain is left differs between patients and from place to place.
    brain = np.maximum(brain - rng.uniform(-0.2, 1.2) + 0.7 * noise(10.0), -59 - p[2])
    tumour, rim, q = grow_tumour(rng, p, cerebrum, variation.tumour_radius_mm)

    fields = fissure_sheets(q, noise(14.0))
    depth = np.minimum(-cerebrum, sheet(fields["mid"], fields["mid_edge"]))
    sulcus = sulcal_distance(rng, q, depth, rng.uniform(*variation.gyral_wavelength_mm))
    centre_core = ellipsoid(q, (0, -6, -4), (34, 34, 27))  # basal ganglia and thalami: no sulci there
    fields |= nuclei(q, rng.uniform(*variation.ventricle_mm))
    fields |= {
        "brain": brain,
        "depth": -cerebrum,
        "fold_depth": depth,
        "sulcus": sulcus,
        "sulcal_depth": np.minimum(np.maximum(20 + 9 * noise(13.0), 4), 2 + np.maximum(centre_core, 0)),
        "sulcal_width": rng.uniform(*variation.sulcal_width_mm) * np.maximum(1 + 0.9 * noise(9.0), 0.0),
        "crown": np.maximum(rng.uniform(1.5, 4.0) + 1.2 * noise(16.0), 0.5),
        "cortex": rng.uniform(*variation.cortex_mm) * np.maximum(1 + 0.22 * noise(10.0), 0.5),
        "cerebellum": cerebellum,
        "stem": stem,
        "ambient": np.minimum(1.2 + 0.8 * noise(10.0), -4 - p[2]),
        "folia": folia_angle(p, noise),
        "vessel": noise(8.0),
        "vessel_radius": np.minimum(np.minimum(0.5 + 0.8 * noise(14.0), 1.4), np.minimum(cerebellum, stem)),
        "dura": noise(12.0),
        "gliosis": rng.uniform(-1.5, 3.0) + 1.8 * noise(8.0),
        "tumour": tumour,
        "rim": rim,
    }
    oedema = spreading_oedema(tumour, conduction(fields), rng.uniform(*variation.oedema_reach_mm))
    return fields | {"oedema": oedema + noise(7.0)}
