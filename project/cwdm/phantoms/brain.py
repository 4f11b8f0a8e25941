"""The healthy brain on the lattice: its outline, fissures, nuclei and folds as signed distances in millimetres."""

from collections.abc import Callable, Mapping

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from cwdm.phantoms.grids import LATTICE_MM, Floats, gyral_noise, lattice_axes, smooth_noise
from cwdm.phantoms.shapes import ellipsoid, excess_length, sheet, smooth_min, steepness, tube
from cwdm.phantoms.variation import Variation

# Chains of (x, y, z, radius) in mm.
VENTRICLE = ((12, 32, 2, 4.0), (14, 18, 9, 6.5), (15, 0, 16, 5.5), (21, -25, 16, 6.0), (38, -42, 7, 6.0))
OCCIPITAL_HORN = ((24, -42, 10, 5.5), (25, -58, 6, 3.0), (23, -72, 4, 1.0))
TEMPORAL_HORN = ((24, -42, 10, 5.0), (33, -34, -6, 2.5), (34, -14, -17, 1.5))
CAUDATE = ((11, 20, 3, 5.5), (14, 10, 10, 5.0), (17, -6, 18, 3.5), (20, -22, 20, 2.0))
HIPPOCAMPUS = ((24, -6, -19, 6.5), (27, -20, -15, 5.0), (26, -34, -5, 4.0))
CHOROID = ((13, -20, 17, 1.0), (21, -38, 12, 2.5), (27, -36, 0, 1.5))
SAGITTAL_SINUS = ((0, 68, 20, 1.0), (0, 40, 63, 1.5), (0, -20, 79, 2.5), (0, -75, 60, 3.0), (0, -104, 2, 3.5))
TRANSVERSE_SINUS = ((0, -102, -2, 3.5), (30, -92, -14, 3.0), (52, -64, -22, 3.0), (56, -45, -28, 2.5))
STRAIGHT_SINUS = ((0, -38, 4, 1.5), (0, -62, 14, 2.0), (0, -100, 0, 2.5))

FISSURES = ("mid", "sylvian", "insula")


def head_coordinates(rng: np.random.Generator, variation: Variation) -> Floats:
    """AC-centred mm of the average head, (3, X, Y, Z), for the points of the lattice: pose, size, warp."""
    scale = rng.uniform(*variation.head_scale) * rng.normal(1, 0.02, 3)
    turn = Rotation.from_euler("xyz", rng.normal(0, variation.rotation_deg / 2, 3), degrees=True)
    shift = rng.normal(0, variation.shift_mm / 2, 3)
    p = np.stack(np.meshgrid(*lattice_axes(), indexing="ij"))
    centre = np.array([0, -16, 6])  # of the brain, about which it turns and grows
    matrix = (turn.as_matrix() / scale[:, None]).astype(np.float32)
    offset = (centre - matrix @ (centre + shift)).astype(np.float32)
    p = np.stack([a * p[0] + b * p[1] + c * p[2] + o for (a, b, c), o in zip(matrix, offset, strict=True)])
    warp = [smooth_noise(rng, 35.0) for _ in range(3)]
    return p + np.float32(variation.warp_mm) * np.stack(warp)


def mirrored(p: Floats) -> Floats:
    """The points with both hemispheres laid onto the left one."""
    return np.stack([abs(p[0]), p[1], p[2]])


def hull(p: Floats) -> tuple[Floats, Floats, Floats]:
    """Outer shape of cerebrum (with its temporal lobes), cerebellum and brainstem."""
    x, y, z = side = mirrored(p)
    egg = np.stack([x * (1 + 0.0016 * (y + 16)), y, z])  # wider behind
    upper = ellipsoid(egg, (0, -16, 5), (66, 89, 66), power=2.2)
    frontal = -21 + 0.12 * x + 0.004 * np.maximum(y - 25, 0) ** 2
    occipital = -21 + 0.06 * np.maximum(-y - 20, 0) - 0.15 * np.maximum(x - 20, 0)
    ahead = np.clip((y + 5) / 20, 0, 1)
    upper = -smooth_min(-upper, z - occipital - ahead * (frontal - occipital), 5)
    lean = np.stack([x + 0.12 * (y + 20), y, z + 0.15 * (y + 20)])
    temporal = ellipsoid(lean, (45, -14, -19), (23, 38, 22))
    core = ellipsoid(side, (0, -4, -6), (36, 34, 16))
    hemisphere = ellipsoid(side, (25, -64, -38), (31, 32, 23))
    cerebellum = smooth_min(hemisphere, ellipsoid(side, (0, -62, -31), (14, 26, 23)), 8)
    stem = tube(side, ((0, -22, -9, 11), (0, -23, -18, 12), (0, -27, -31, 14), (0, -33, -48, 9), (0, -40, -72, 8)))
    # Cerebral peduncles up to the internal capsule, cerebellar ones from the pons backwards.
    peduncle = tube(side, ((16, -6, 2, 7), (9, -18, -14, 6), (10, -28, -31, 10), (22, -52, -34, 8)))
    cerebrum = smooth_min(smooth_min(upper, core, 6), temporal, 4)
    return np.maximum(cerebrum, 1.5 - cerebellum), cerebellum, smooth_min(stem, peduncle, 4)


def fissure_sheets(p: Floats, wobble: Floats) -> dict[str, Floats]:
    """Sheets of FISSURES: signed distance across, and distance beyond the edge."""
    x, y, z = mirrored(p)
    height = np.where(z > 4, (z - 4) / 25, 0.25 * (z - 4) / 25)
    callosum = np.sqrt(((y + 4) / 36) ** 2 + height**2) - 1
    sylvian = (z + 0.6 * y) / 1.17 + 3 * wobble
    return {
        "mid": p[0] + 1.3 * wobble,
        "mid_edge": -30 * callosum,
        "sylvian": sylvian,
        "sylvian_edge": excess_length(39 - x, -44 - y, y - 26),
        "insula": x - 39 + 0.004 * (y + 2) ** 2 + 2 * wobble,
        "insula_edge": excess_length(abs(sylvian - 1) - 10, -24 - y, y - 18),
    }


def nuclei(p: Floats, ventricle_mm: float) -> dict[str, Floats]:
    """Ventricles, deep grey matter, corpus callosum, cisterns, choroid plexus and great veins."""
    x, y, z = side = mirrored(p)
    # The body is a slanting slit, wider above; the horns are round.
    slit = np.stack([1.7 * x - 0.5 * (z - 12), y, z - 0.25 * x])
    horns = np.minimum(tube(side, OCCIPITAL_HORN), tube(side, TEMPORAL_HORN))
    lateral = np.minimum(tube(slit, VENTRICLE) / 1.5, horns)
    arc = np.sqrt(((y + 4) / 36) ** 2 + ((z - 4) / 25) ** 2) - 1
    tilt = np.stack([x + 0.25 * y, y, z])
    sinuses = [tube(side, knots) for knots in (SAGITTAL_SINUS, STRAIGHT_SINUS, TRANSVERSE_SINUS)]
    return {
        "lateral": np.maximum(lateral - 0.5 * ventricle_mm, 0.7 - x),
        "third": ellipsoid(side, (0, -10, 0), (1.8 + 0.4 * ventricle_mm, 15, 10)),
        "fourth": ellipsoid(side, (0, -43, -32), (6, 3.5, 8)),
        "cistern": np.minimum(ellipsoid(side, (0, -42, -2), (13, 4, 6)), ellipsoid(side, (0, 6, -19), (11, 8, 6))),
        "callosum": np.maximum(np.maximum(abs(arc * 28 + 4) - 3.2, x - 16), -2 - z),
        "thalamus": ellipsoid(tilt, (6.5, -16, 8), (9.5, 14, 9)),
        "striatum": np.minimum(tube(side, CAUDATE), ellipsoid(tilt, (26.5, 4, 1), (5, 17, 11))),
        "pallidum": ellipsoid(tilt, (19, -1, -1), (5, 11, 7)),
        "hippocampus": tube(side, HIPPOCAMPUS),
        "choroid": tube(side, CHOROID),
        "sinus": np.minimum.reduce(sinuses),
    }


def sulcal_distance(rng: np.random.Generator, q: Floats, depth: Floats, wavelength_mm: float) -> Floats:
    """Signed distance to the sulci: zero sheets of noise that is drawn out along the inward normal."""
    outward = -np.stack(np.gradient(ndimage.gaussian_filter(depth, 1.5), LATTICE_MM))
    bent = 0.9 * outward + 0.15 * np.stack([smooth_noise(rng, 14.0) for _ in range(3)])
    folds = gyral_noise(rng, q + np.clip(depth, 0, 25) * bent, wavelength_mm)
    slope: Floats = np.maximum(steepness(folds), 0.07)
    return folds / slope


def folia_angle(p: Floats, noise: Callable[[float], Floats]) -> Floats:
    """Angle about the root of the cerebellar tree, in which its lobules and their leaves are periodic."""
    behind = np.hypot(0.6 * p[0], np.minimum(p[1] + 46, 0))
    return np.arctan2(p[2] + 33, behind) + 0.1 * noise(14.0) + 0.05 * noise(8.0)


def pial_distance(fields: Mapping[str, Floats]) -> Floats:
    """Depth in mm below the folded cortical surface; negative in the CSF."""
    depth, folded, wide = fields["depth"], fields["fold_depth"], fields["sulcal_width"]
    fissures = [sheet(fields[name], fields[f"{name}_edge"]) - wide for name in FISSURES]
    opening = 0.4 + 1.2 * np.exp(-np.maximum(folded, 0) / 5)
    sulci = sheet(fields["sulcus"], folded - fields["sulcal_depth"]) - wide * opening
    # The crowns of the gyri are round, so that every sulcus opens towards the skull.
    return smooth_min(depth, np.minimum.reduce([*fissures, sulci]), fields["crown"])


def deep_grey(fields: Mapping[str, Floats]) -> Floats:
    """Distance to the nuclei and the hippocampus."""
    return np.minimum.reduce([fields[name] for name in ("thalamus", "striatum", "pallidum", "hippocampus")])
