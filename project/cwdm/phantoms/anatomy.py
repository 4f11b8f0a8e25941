"""The anatomy of a synthetic patient: a folded brain with a glioma, as layers of tissue on any voxel grid.

Every structure is a signed distance in millimetres, negative inside, computed on a fixed 2.5 mm lattice in
AC-centred coordinates (x left, y anterior, z superior) and interpolated to the voxels, so that the same random
numbers are the same brain at any resolution. Distances become fractions of voxels, painted tissue over tissue.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.spatial.transform import Rotation

Floats = NDArray[np.float32]
Range = tuple[float, float]
Shape = tuple[int, int, int]

NECROSIS, OEDEMA, ENHANCING = 1, 2, 3

LATTICE_MM = 2.5
LATTICE_LIMITS_MM = ((-84, 84), (-116, 84), (-74, 88))
AC_FROM_CENTRE_MM = (0.0, 14.0, -7.0)  # anterior commissure from the centre of the array, where SRI24 has it


@dataclass(frozen=True)
class AnatomyVariation:
    """How far patients differ; each range is sampled uniformly once a patient.

    `ventricle_mm` is what the ventricles grow by.
    """

    head_scale: Range = (0.9, 1.02)
    rotation_deg: float = 4.0
    shift_mm: float = 2.0
    warp_mm: float = 2.0
    gyral_wavelength_mm: Range = (14.0, 18.0)
    sulcal_width_mm: Range = (0.0, 0.4)
    cortex_mm: Range = (2.4, 3.3)
    ventricle_mm: Range = (-1.0, 3.0)
    tumour_radius_mm: Range = (10.0, 24.0)
    oedema_reach_mm: Range = (8.0, 25.0)


@dataclass(frozen=True)
class Layer:
    """A tissue laid over what is already there: `fraction` of the voxels `index` of `Grid.near` becomes `tissue`.

    The names of the tissues are those of `phantom.TISSUES`.
    """

    tissue: str
    index: NDArray[np.intp]
    fraction: Floats


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
    box: tuple[slice, ...]
    spacing_mm: float
    near: NDArray[np.intp]
    from_lattice: "Interpolation"

    def sample(self, field: Floats) -> Floats:
        """Interpolate a lattice field at the voxels `near`."""
        return self.from_lattice(field).ravel()[self.near]

    def axis_mm(self, axis: int) -> Floats:
        """Position of the box's voxels along an axis, mm from the anterior commissure."""
        return _voxel_axes(self.array_shape, self.spacing_mm)[axis][self.box[axis]]

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
    mask: NDArray[np.bool_]
    layers: list[Layer]
    seg: NDArray[np.uint8]


def make_anatomy(rng: np.random.Generator, shape: Shape, spacing_mm: float, variation: AnatomyVariation) -> Anatomy:
    """Draw a patient.

    Args:
        rng: decides everything about the patient, at any resolution.
        shape: (X, Y, Z) of the array in voxels, stored LPS; what of the brain does not fit in is cut off.
        spacing_mm: edge of the cubic voxels.
        variation: how far patients differ.
    """
    fields = _lattice_fields(rng, variation)
    grid = _grid(fields["brain"], shape, spacing_mm)
    at = {name: grid.sample(field) for name, field in fields.items()}
    mask = grid.volume(at["brain"] < 0)
    layers, labels = _layers(at, spacing_mm)
    return Anatomy(grid, mask, layers, grid.volume(labels) * mask)


def _lattice_fields(rng: np.random.Generator, variation: AnatomyVariation) -> dict[str, Floats]:
    """All of a patient's geometry on the lattice: distances in mm, smooth enough to interpolate."""
    noise = partial(smooth_noise, rng)
    p = _head_coordinates(rng, variation)
    cerebrum, cerebellum, stem = _hull(p)
    cerebrum = cerebrum + 0.8 * noise(14.0)
    brain = _smooth_min(_smooth_min(cerebrum, cerebellum, 14), stem, 14)
    # How much of the fluid and membranes around the brain is left differs between patients and from place to place.
    brain = np.maximum(brain - rng.uniform(-0.2, 1.2) + 0.7 * noise(10.0), -59 - p[2])
    tumour, rim, q = _tumour(rng, p, cerebrum, variation)

    fields = _fissures(q, noise(14.0))
    depth = np.minimum(-cerebrum, _sheet(fields["mid"], fields["mid_edge"]))
    sulcus = _sulci(rng, q, depth, rng.uniform(*variation.gyral_wavelength_mm))
    centre_core = _ellipsoid(q, (0, -6, -4), (34, 34, 27))  # basal ganglia and thalami: no sulci there
    fields |= _nuclei(q, rng.uniform(*variation.ventricle_mm))
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
        "folia": _folia(p, noise),
        "vessel": noise(8.0),
        "vessel_radius": np.minimum(np.minimum(0.5 + 0.8 * noise(14.0), 1.4), np.minimum(cerebellum, stem)),
        "dura": noise(12.0),
        "gliosis": rng.uniform(-1.5, 3.0) + 1.8 * noise(8.0),
        "tumour": tumour,
        "rim": rim,
    }
    oedema = _spreading_oedema(tumour, _conduction(fields), rng.uniform(*variation.oedema_reach_mm))
    return fields | {"oedema": oedema + noise(7.0)}


# Brain

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


def _head_coordinates(rng: np.random.Generator, variation: AnatomyVariation) -> Floats:
    """AC-centred mm of the average head, (3, X, Y, Z), for the points of the lattice: pose, size, warp."""
    scale = rng.uniform(*variation.head_scale) * rng.normal(1, 0.02, 3)
    turn = Rotation.from_euler("xyz", rng.normal(0, variation.rotation_deg / 2, 3), degrees=True)
    shift = rng.normal(0, variation.shift_mm / 2, 3)
    p = np.stack(np.meshgrid(*_lattice_axes(), indexing="ij"))
    centre = np.array([0, -16, 6])  # of the brain, about which it turns and grows
    matrix = (turn.as_matrix() / scale[:, None]).astype(np.float32)
    offset = (centre - matrix @ (centre + shift)).astype(np.float32)
    p = np.stack([a * p[0] + b * p[1] + c * p[2] + o for (a, b, c), o in zip(matrix, offset, strict=True)])
    warp = [smooth_noise(rng, 35.0) for _ in range(3)]
    return p + np.float32(variation.warp_mm) * np.stack(warp)


def _mirrored(p: Floats) -> Floats:
    """The points with both hemispheres laid onto the left one."""
    return np.stack([abs(p[0]), p[1], p[2]])


def _hull(p: Floats) -> tuple[Floats, Floats, Floats]:
    """Outer shape of cerebrum (with its temporal lobes), cerebellum and brainstem."""
    x, y, z = side = _mirrored(p)
    egg = np.stack([x * (1 + 0.0016 * (y + 16)), y, z])  # wider behind
    upper = _ellipsoid(egg, (0, -16, 5), (66, 89, 66), power=2.2)
    frontal = -21 + 0.12 * x + 0.004 * np.maximum(y - 25, 0) ** 2
    occipital = -21 + 0.06 * np.maximum(-y - 20, 0) - 0.15 * np.maximum(x - 20, 0)
    ahead = np.clip((y + 5) / 20, 0, 1)
    upper = -_smooth_min(-upper, z - occipital - ahead * (frontal - occipital), 5)
    lean = np.stack([x + 0.12 * (y + 20), y, z + 0.15 * (y + 20)])
    temporal = _ellipsoid(lean, (45, -14, -19), (23, 38, 22))
    core = _ellipsoid(side, (0, -4, -6), (36, 34, 16))
    hemisphere = _ellipsoid(side, (25, -64, -38), (31, 32, 23))
    cerebellum = _smooth_min(hemisphere, _ellipsoid(side, (0, -62, -31), (14, 26, 23)), 8)
    stem = _tube(side, ((0, -22, -9, 11), (0, -23, -18, 12), (0, -27, -31, 14), (0, -33, -48, 9), (0, -40, -72, 8)))
    # Cerebral peduncles up to the internal capsule, cerebellar ones from the pons backwards.
    peduncle = _tube(side, ((16, -6, 2, 7), (9, -18, -14, 6), (10, -28, -31, 10), (22, -52, -34, 8)))
    cerebrum = _smooth_min(_smooth_min(upper, core, 6), temporal, 4)
    return np.maximum(cerebrum, 1.5 - cerebellum), cerebellum, _smooth_min(stem, peduncle, 4)


def _fissures(p: Floats, wobble: Floats) -> dict[str, Floats]:
    """Sheets of FISSURES: signed distance across, and distance beyond the edge."""
    x, y, z = _mirrored(p)
    height = np.where(z > 4, (z - 4) / 25, 0.25 * (z - 4) / 25)
    callosum = np.sqrt(((y + 4) / 36) ** 2 + height**2) - 1
    sylvian = (z + 0.6 * y) / 1.17 + 3 * wobble
    return {
        "mid": p[0] + 1.3 * wobble,
        "mid_edge": -30 * callosum,
        "sylvian": sylvian,
        "sylvian_edge": _spread(39 - x, -44 - y, y - 26),
        "insula": x - 39 + 0.004 * (y + 2) ** 2 + 2 * wobble,
        "insula_edge": _spread(abs(sylvian - 1) - 10, -24 - y, y - 18),
    }


def _nuclei(p: Floats, ventricle_mm: float) -> dict[str, Floats]:
    """Ventricles, deep grey matter, corpus callosum, cisterns, choroid plexus and great veins."""
    x, y, z = side = _mirrored(p)
    # The body is a slanting slit, wider above; the horns are round.
    slit = np.stack([1.7 * x - 0.5 * (z - 12), y, z - 0.25 * x])
    horns = np.minimum(_tube(side, OCCIPITAL_HORN), _tube(side, TEMPORAL_HORN))
    lateral = np.minimum(_tube(slit, VENTRICLE) / 1.5, horns)
    arc = np.sqrt(((y + 4) / 36) ** 2 + ((z - 4) / 25) ** 2) - 1
    tilt = np.stack([x + 0.25 * y, y, z])
    sinuses = [_tube(side, knots) for knots in (SAGITTAL_SINUS, STRAIGHT_SINUS, TRANSVERSE_SINUS)]
    return {
        "lateral": np.maximum(lateral - 0.5 * ventricle_mm, 0.7 - x),
        "third": _ellipsoid(side, (0, -10, 0), (1.8 + 0.4 * ventricle_mm, 15, 10)),
        "fourth": _ellipsoid(side, (0, -43, -32), (6, 3.5, 8)),
        "cistern": np.minimum(_ellipsoid(side, (0, -42, -2), (13, 4, 6)), _ellipsoid(side, (0, 6, -19), (11, 8, 6))),
        "callosum": np.maximum(np.maximum(abs(arc * 28 + 4) - 3.2, x - 16), -2 - z),
        "thalamus": _ellipsoid(tilt, (6.5, -16, 8), (9.5, 14, 9)),
        "striatum": np.minimum(_tube(side, CAUDATE), _ellipsoid(tilt, (26.5, 4, 1), (5, 17, 11))),
        "pallidum": _ellipsoid(tilt, (19, -1, -1), (5, 11, 7)),
        "hippocampus": _tube(side, HIPPOCAMPUS),
        "choroid": _tube(side, CHOROID),
        "sinus": np.minimum.reduce(sinuses),
    }


def _sulci(rng: np.random.Generator, q: Floats, depth: Floats, wavelength_mm: float) -> Floats:
    """Signed distance to the sulci: zero sheets of noise that is drawn out along the inward normal."""
    outward = -np.stack(np.gradient(ndimage.gaussian_filter(depth, 1.5), LATTICE_MM))
    bent = 0.9 * outward + 0.15 * np.stack([smooth_noise(rng, 14.0) for _ in range(3)])
    folds = _gyral_noise(rng, q + np.clip(depth, 0, 25) * bent, wavelength_mm)
    slope: Floats = np.maximum(_slope(folds), 0.07)
    return folds / slope


def _folia(p: Floats, noise: Callable[[float], Floats]) -> Floats:
    """Angle about the root of the cerebellar tree, in which its lobules and their leaves are periodic."""
    behind = np.hypot(0.6 * p[0], np.minimum(p[1] + 46, 0))
    return np.arctan2(p[2] + 33, behind) + 0.1 * noise(14.0) + 0.05 * noise(8.0)


def _pial_distance(fields: Mapping[str, Floats]) -> Floats:
    """Depth in mm below the folded cortical surface; negative in the CSF."""
    depth, folded, wide = fields["depth"], fields["fold_depth"], fields["sulcal_width"]
    fissures = [_sheet(fields[name], fields[f"{name}_edge"]) - wide for name in FISSURES]
    opening = 0.4 + 1.2 * np.exp(-np.maximum(folded, 0) / 5)
    sulci = _sheet(fields["sulcus"], folded - fields["sulcal_depth"]) - wide * opening
    # The crowns of the gyri are round, so that every sulcus opens towards the skull.
    return _smooth_min(depth, np.minimum.reduce([*fissures, sulci]), fields["crown"])


# Tumour


def _tumour(
    rng: np.random.Generator, p: Floats, cerebrum: Floats, variation: AnatomyVariation
) -> tuple[Floats, Floats, Floats]:
    """Distance to the tumour, thickness of its enhancing rim, and where each point lay before the tumour grew."""
    radius = rng.uniform(*variation.tumour_radius_mm)
    # Somewhere in a hemisphere, clear of the midline and of the surface.
    room = (-cerebrum > 0.6 * radius + 5) & (abs(p[0]) > 0.6 * radius + 5) & (p[2] > -22)
    sites = np.argwhere(room)
    site = sites[rng.integers(len(sites))]
    centre = [float(axis[tuple(site)]) for axis in p]
    before = _mass_effect(p, -cerebrum, centre, rng.uniform(0.3, 0.75) * radius)
    tumour = _ellipsoid(p, centre, (radius * rng.uniform(0.75, 1.15, 3)).tolist())
    tumour = tumour + 0.22 * radius * smooth_noise(rng, 14.0) + 1.5 * smooth_noise(rng, 6.0)
    rim = rng.uniform(1.0, 3.5) * (1 + 0.8 * smooth_noise(rng, 7.0))
    return np.maximum(tumour, 2 + cerebrum), rim, before


def _mass_effect(p: Floats, depth: Floats, centre: Sequence[float], radius_mm: float) -> Floats:
    """Where each point lay before a ball of tissue of `radius_mm` grew at `centre`; the skull does not move."""
    offset = np.stack([axis - c for axis, c in zip(p, centre, strict=True)])
    r = np.sqrt((offset**2).sum(0)) + 1e-3
    before = np.cbrt(np.maximum(r**3 - radius_mm**3 * np.exp(-((r / (3 * radius_mm)) ** 2)), 0))
    return p + offset * ((before / r - 1) * np.clip(depth / 12, 0, 1))


def _conduction(fields: Mapping[str, Floats]) -> NDArray[np.float64]:
    """How well fluid spreads, 0 to 1: in white matter, hardly in its dense tracts, in deep grey matter or below it."""
    white = np.clip(_pial_distance(fields) - fields["cortex"], 0, 1)
    white = white * np.clip(fields["lateral"], 0, 1) * np.clip(fields["third"], 0, 1)
    below = np.minimum(fields["stem"], fields["cerebellum"]) < 2
    return np.where(_deep_grey(fields) < 1, 0.05, np.where(below | (fields["callosum"] < 0), 0.3, 1)) * white


def _deep_grey(fields: Mapping[str, Floats]) -> Floats:
    """Distance to the nuclei and the hippocampus."""
    return np.minimum.reduce([fields[name] for name in ("thalamus", "striatum", "pallidum", "hippocampus")])


def _spreading_oedema(tumour: Floats, conduction: NDArray[np.float64], reach_mm: float) -> Floats:
    """Signed distance (negative inside) of fluid that seeps from the tumour where tissue conducts it.

    Diffusion confined to the conducting tissue runs along white matter and around ventricles and sulci.
    """
    inside = np.argwhere(tumour < reach_mm + 16)
    box = tuple(slice(lo, hi + 1) for lo, hi in zip(inside.min(0), inside.max(0), strict=True))
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
    distance[box] = np.clip((edge - level) / np.maximum(_slope(level), 0.05), -20, 20)
    return distance


# Voxels

Inside = Callable[..., Floats]  # fraction of a voxel that lies inside: distance, then the width of the border


def _voxel_axes(shape: Shape, spacing_mm: float) -> list[Floats]:
    """Position of every voxel along the three array axes, mm from the anterior commissure, y forward."""
    return [
        ((np.arange(n) - (n - 1) / 2) * spacing_mm * sign - ac).astype(np.float32)
        for n, sign, ac in zip(shape, (1, -1, 1), AC_FROM_CENTRE_MM, strict=True)
    ]


def _grid(brain: Floats, shape: Shape, spacing_mm: float) -> Grid:
    """The box of voxels up to a few millimetres outside the brain, so that blurring sees what lies there."""
    margin = max(4.0, spacing_mm)
    box, matrices = [], []
    for k, (axis, knots) in enumerate(zip(_voxel_axes(shape, spacing_mm), _lattice_axes(), strict=True)):
        reached = knots[(brain < margin).any(tuple({0, 1, 2} - {k}))]
        hit = np.flatnonzero((axis >= reached[0]) & (axis <= reached[-1]))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
        matrices.append(linear(axis[box[-1]], knots))
    from_lattice = Interpolation(*matrices)
    near = np.flatnonzero(from_lattice(brain) < margin)
    return Grid(shape, tuple(box), spacing_mm, near, from_lattice)


def _layers(at: Mapping[str, Floats], spacing_mm: float) -> tuple[list[Layer], NDArray[np.uint8]]:
    """Tissues from the bottom up, each over the ones before, and the tumour labels, given the fields at voxels."""

    def inside(distance: Floats, width: float = spacing_mm) -> Floats:
        return np.clip(0.5 - distance / width, 0, 1)

    pial = _pial_distance(at)
    white = inside(at["cortex"] - pial, spacing_mm + 0.6)
    blocked = np.maximum(inside(at["lateral"]), inside(at["third"]))
    tumour = inside(at["tumour"], spacing_mm + 0.5) * (1 - blocked)
    core = inside(at["tumour"] + np.maximum(at["rim"], 0), spacing_mm + 0.5)
    below = inside(np.minimum(at["stem"], at["cerebellum"]), 3.0)
    tracts = white * (1 - blocked) * (1 - 0.85 * inside(_deep_grey(at), 2.5)) * (1 - below)
    oedema = 0.85 * inside(at["oedema"], 4.0) * tracts
    gliosis = 0.5 * inside(at["lateral"] - at["gliosis"], 3.0) * tracts
    layers = [  # widths above the spacing: borders that are blurred in the brain itself
        _layer("csf", np.ones_like(pial)),
        _layer("grey", inside(-pial)),
        _layer("white", white),
        _layer("white", 0.9 * inside(at["callosum"])),
        _layer("csf", inside(at["cistern"])),
        _layer("csf", inside(at["lateral"])),
        _layer("csf", inside(at["third"])),
        _layer("thalamus", 0.8 * inside(at["thalamus"], 2.5)),
        _layer("striatum", inside(at["striatum"], 1.5)),
        _layer("pallidum", 0.9 * inside(at["pallidum"], 2.0)),
        _layer("grey", 0.9 * inside(at["hippocampus"], 1.5)),
        _layer("csf", inside(at["stem"] - at["ambient"])),
        *_cerebellum(at, inside, spacing_mm),
        _layer("brainstem", inside(at["stem"])),
        _layer("csf", inside(at["fourth"])),
        *_vessels(at, inside, np.flatnonzero(pial < 1 + spacing_mm), pial),
        _layer("choroid", 0.8 * inside(at["choroid"]) * inside(at["lateral"])),
        _layer("vessel", 0.9 * inside(at["sinus"])),
        _layer("gliosis", gliosis),
        _layer("oedema", oedema),
        _layer("enhancing", tumour),
        _layer("necrosis", tumour * core),
    ]
    seg = np.zeros(pial.shape, np.uint8)
    seg[oedema > 0.35] = OEDEMA
    seg[tumour > 0.5] = ENHANCING
    seg[(tumour > 0.5) & (core > 0.5)] = NECROSIS
    return layers, seg


def _layer(tissue: str, fraction: Floats, among: NDArray[np.intp] | None = None) -> Layer:
    """A layer where there is any of it; `fraction` is given at all voxels, or at those that are `among` them."""
    some = np.flatnonzero(fraction > 0.01)
    return Layer(tissue, some if among is None else among[some], fraction[some])


def _cerebellum(at: Mapping[str, Floats], inside: Inside, spacing_mm: float) -> list[Layer]:
    """Lobules parted by fissures and lined with leaves too fine to see apart, on branches of white matter."""
    here = np.flatnonzero(at["cerebellum"] < spacing_mm)
    distance, angle = at["cerebellum"][here], at["folia"][here]
    lobule, leaf = abs(np.sin(5 * angle)), abs(np.sin(16 * angle))  # 0 in a fissure, 1 between two
    cerebellum = inside(distance)
    fissure = inside(lobule - 0.12 * np.exp(distance / 9), 0.25) * inside(-distance - 17, 5.0)
    crack = inside(leaf - 0.1, 0.7) * inside(-distance - 5, 4.0)
    branch = inside(11 + distance + 9 * (1 - lobule) - 20 * np.maximum(lobule - 0.8, 0), 4.0)
    return [
        _layer("cerebellar", cerebellum, here),
        _layer("white", 0.95 * cerebellum * branch, here),
        _layer("csf", cerebellum * np.maximum(0.7 * fissure, 0.3 * crack), here),
    ]


def _vessels(at: Mapping[str, Floats], inside: Inside, here: NDArray[np.intp], pial: Floats) -> list[Layer]:
    """Vessels in sulci, in fissures and on the surface, and what is left of the dura, at the voxels `here`."""

    def of(name: str) -> Floats:
        return at[name][here]

    sheets = [abs(of("sulcus")), _sheet(of("mid"), of("mid_edge")), _sheet(of("sylvian"), of("sylvian_edge"))]
    tube = np.hypot(np.minimum.reduce([*sheets, abs(of("depth"))]), 6 * of("vessel"))
    falx = _sheet(of("mid"), of("mid_edge") + 8)
    tentorium = _sheet(of("cerebellum") - 1, _spread(of("depth") - 2, 3 - of("stem")))
    dura = inside(np.minimum(falx, tentorium) - 0.35) * inside(-0.5 - of("dura"), 1.0)
    rind = inside(-0.6 - of("brain")) * inside(0.6 - of("dura"), 1.0)
    return [
        _layer("dura", 0.8 * np.maximum(dura, 0.7 * rind), here),
        _layer("vessel", 0.9 * inside(tube - of("vessel_radius")) * inside(pial[here] - 1), here),
    ]


# Distances


def _ellipsoid(p: Floats, centre: Sequence[float], radii: Sequence[float], power: float = 2) -> Floats:
    """Distance to an ellipsoid, first-order (exact on its surface); p is (3, ...). Power > 2 makes it boxy."""
    q = [abs(axis - c) / r for axis, c, r in zip(p, centre, radii, strict=True)]
    length = (q[0] ** power + q[1] ** power + q[2] ** power) ** (1 / power) + 1e-3
    slope = [(axis / length) ** (power - 1) / r for axis, r in zip(q, radii, strict=True)]
    return (length - 1) / np.sqrt(slope[0] ** 2 + slope[1] ** 2 + slope[2] ** 2 + 1e-8)


def _tube(p: Floats, knots: Sequence[tuple[float, float, float, float]]) -> Floats:
    """Distance to a chain of cones through knots (x, y, z, radius)."""
    distance = np.full(p.shape[1:], np.inf, np.float32)
    for start, end in pairwise(np.array(knots, np.float32)):
        along = (end - start)[:3]
        x, y, z = (axis - s for axis, s in zip(p, start[:3], strict=True))
        t = np.clip((x * along[0] + y * along[1] + z * along[2]) / (along @ along), 0, 1)
        square = (x - t * along[0]) ** 2 + (y - t * along[1]) ** 2 + (z - t * along[2]) ** 2
        distance = np.minimum(distance, np.sqrt(square) - start[3] - t * (end - start)[3])
    return distance


def _smooth_min(a: Floats, b: Floats, width: Floats | float) -> Floats:
    """Union of two distances with a fillet of about `width` mm."""
    h = np.clip(0.5 + 0.5 * (b - a) / width, 0, 1)
    return b + h * (a - b) - width * h * (1 - h)


def _spread(*excess: Floats) -> Floats:
    """Length of the vector whose components are the positive parts of `excess`."""
    return np.sqrt(sum(np.maximum(e, 0) ** 2 for e in excess))


def _sheet(across: Floats, beyond: Floats) -> Floats:
    """Distance to a sheet that ends where `beyond`, the distance past its edge, turns positive."""
    return np.hypot(across, np.maximum(beyond, 0))


def _slope(field: Floats) -> Floats:
    """Length of the gradient of a lattice field, per mm."""
    return np.sqrt(sum(g**2 for g in np.gradient(field, LATTICE_MM)))


# Interpolation and smooth random fields


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


@cache
def _lattice_axes() -> tuple[Floats, ...]:
    a, b, c = (np.arange(lo, hi + LATTICE_MM, LATTICE_MM, dtype=np.float32) for lo, hi in LATTICE_LIMITS_MM)
    return a, b, c


@cache
def _spline_to_lattice(scale_mm: float) -> tuple[tuple[int, ...], Interpolation]:
    """Number of B-splines `scale_mm` apart along each axis of the lattice, and their sum on the lattice."""
    knots = [np.arange(lo - 2 * scale_mm, hi + 3 * scale_mm, scale_mm) for lo, hi in LATTICE_LIMITS_MM]
    matrices = [_cubic(axis, k) for axis, k in zip(_lattice_axes(), knots, strict=True)]
    return tuple(len(k) for k in knots), Interpolation(*matrices)


def smooth_noise(rng: np.random.Generator, scale_mm: float) -> Floats:
    """Gaussian field on the lattice with unit variance and no detail below `scale_mm`."""
    splines, to_lattice = _spline_to_lattice(scale_mm)
    std = np.float32(0.479**1.5)  # 0.479: squares of the B-splines that overlap at a point, averaged over points
    return to_lattice(rng.standard_normal(splines, np.float32)) / std


def _gyral_noise(rng: np.random.Generator, p: Floats, wavelength_mm: float) -> Floats:
    """Band-limited Gaussian field at points p (3, ...): its zero sheets lie half a wavelength apart."""
    step, size = 3.0, 72
    k = np.fft.fftfreq(size, step)
    radius = np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + np.fft.rfftfreq(size, step) ** 2)
    ring = np.exp(-0.5 * ((radius * wavelength_mm - 1) / 0.38) ** 2)
    field = np.fft.irfftn(np.fft.rfftn(rng.standard_normal((size,) * 3)) * ring).astype(np.float32)
    # Without the prefilter the quadratic splines smooth a little, which is welcome here.
    return ndimage.map_coordinates(field / field.std(), p / step, order=2, mode="grid-wrap", prefilter=False)
