"""Rigid registration of brains by mutual information (Mattes et al., IEEE TMI 2003, 22:120), coarse to fine.

Images are corrected for their bias field (N4) for the measure alone; nothing here changes what will be resampled.
The same input gives the same result on a machine, and within hundredths of a millimetre on one of another number of
cores: samples are seeded, and the number of threads is fixed where the library heeds that.
"""

from collections.abc import Iterable, Sequence
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cwdm.arrays import Mask, bounding_box
from cwdm.images import Image
from cwdm.scans.itk import Matrix, sitk, to_itk, to_matrix, to_transform

LEVELS_MM = (4.0, 2.0, 1.0)
"""Resolutions of the fit, coarse to fine, after the search for a start at `SEARCH_MM`."""

SEARCH_MM = 6.0
_N4_MM = 8.0
_MARGIN_MM = 6.0
"""Around the brain that counts in the measure, so that its outline does too."""

_BINS = 32
_GROWN_FROM_MM = 4.0
"""Resolution down to which outlines count; below it, what is at least `_RIM_MM` inside the brain alone."""

_RIM_MM = 3.0
_SAMPLES = {2.0: 0.5, 1.0: 0.25}
"""Share of the voxels that is sampled at each resolution."""

_SEED = 20
_POWELL_ITERATIONS = 6
_THREADS = 2
"""Threads, each of which sums a part; the number decides the last digits, from which Powell's method goes on."""

_HALF = 1e-4
"""By how much a share of a voxel may miss the half and count as one."""

_TURNS_DEG = (-30.0, -15.0, 15.0, 30.0)
_FEW = 3
"""Starts that are followed, of all that are tried."""

POOR_OVERLAP = 0.85
"""Dice of two brains of a patient below which other starts are tried."""


class Brain(NamedTuple):
    """What is registered: one contrast, for the measure alone.

    Attributes:
        image: without bias, bright outliers, and all that is far from the brain; voxels of about 1 mm or more.
        mask: the brain on the same grid.
    """

    image: sitk.Image
    mask: sitk.Image


class Registration(NamedTuple):
    """A rigid movement that was found.

    Attributes:
        matrix: (4, 4), points of the fixed image to points of the moving one, LPS mm.
        information: mutual information in nats around the fixed brain.
        before: the same where the headers put the images.
        overlap: Dice of the two brain masks.
        starts: how many starts were tried.
    """

    matrix: Matrix
    information: float
    before: float
    overlap: float
    starts: int


def prepare(image: Image, mask: Mask, biased: bool = True) -> Brain:
    """An image as the measure of registration sees it.

    Args:
        image: one contrast.
        mask: the brain in it.
        biased: False where there is no bias field to correct, as in an atlas.

    Raises:
        ShearError: its axes are not at right angles.
    """
    margin = int(np.ceil(_MARGIN_MM / float(np.linalg.norm(image.affine[:3, :3], axis=0).min())))
    box = bounding_box(mask, margin)
    corner = image.affine.copy()
    corner[:3, 3] += corner[:3, :3] @ [side.start for side in box]
    whole = sitk.Cast(to_itk(image.volume[box], corner), sitk.sitkFloat32)
    inside = to_itk(mask[box], corner)
    factors = _voxels(LEVELS_MM[-1], whole)
    small = sitk.BinShrink(whole, factors)
    brain = sitk.BinShrink(sitk.Cast(inside, sitk.sitkFloat32), factors) >= 0.5
    return Brain(_without_outliers(_without_bias(small, brain) if biased else small, brain), brain)


def _without_bias(image: sitk.Image, mask: sitk.Image) -> sitk.Image:
    """The image divided by its bias field, which is fitted at `_N4_MM`."""
    lowest = float(sitk.GetArrayViewFromImage(image).min())
    positive = image - min(lowest, 0.0) + 1.0  # N4 takes logarithms
    factors = _voxels(_N4_MM, image)
    filter_ = sitk.N4BiasFieldCorrectionImageFilter()
    filter_.SetMaximumNumberOfIterations([20, 20, 20])
    filter_.SetConvergenceThreshold(1e-3)
    filter_.SetNumberOfThreads(_THREADS)
    small = sitk.BinShrink(positive, factors)
    filter_.Execute(small, sitk.BinShrink(sitk.Cast(mask, sitk.sitkFloat32), factors) >= 0.5)
    field = sitk.Exp(sitk.Cast(filter_.GetLogBiasFieldAsImage(small), sitk.sitkFloat32))
    return image / sitk.Resample(field, image, sitk.Transform(), sitk.sitkLinear, 1.0, sitk.sitkFloat32, True)


def _without_outliers(image: sitk.Image, mask: sitk.Image) -> sitk.Image:
    """Intensities from 0 to 1 for the middle 99 % of the brain, and 0 away from it."""
    values = sitk.GetArrayViewFromImage(image)[sitk.GetArrayViewFromImage(mask) > 0]
    low, high = (float(value) for value in np.percentile(values, (0.5, 99.5)))
    unit = sitk.Clamp((image - low) / max(high - low, 1e-6), sitk.sitkFloat32, 0.0, 1.0)
    return unit * sitk.Cast(mask, sitk.sitkFloat32)


def register(fixed: Brain, moving: Brain, levels_mm: Sequence[float] = LEVELS_MM) -> Registration:
    """Find the rigid movement that lays one brain over another.

    Args:
        fixed, moving: see `prepare`.
        levels_mm: resolutions, coarse to fine.
    """
    centre = centre_of(fixed.mask)
    search = coarser(fixed, SEARCH_MM), coarser(moving, SEARCH_MM)
    shift = np.eye(4)
    shift[:3, 3] = centre_of(moving.mask) - centre
    starts = [np.eye(4), *(shift @ about(turn, centre) for turn in _small_turns())]
    matrix = best_start(*search, starts)
    if (overlap := _overlap(*search, matrix)) < POOR_OVERLAP:
        more = [shift @ about(turn, centre) for turn in quarter_turns()]
        other, starts = best_start(*search, [*starts, *more]), [*starts, *more]
        matrix = other if _overlap(*search, other) > overlap else matrix
    for level in levels_mm:
        matrix = _fit(coarser(fixed, level), coarser(moving, level), matrix, level)
    measure = coarser(fixed, 2.0), coarser(moving, 2.0)
    return Registration(
        matrix,
        information(*measure, matrix),
        information(*measure, np.eye(4)),
        _overlap(fixed, moving, matrix),
        len(starts),
    )


def information(fixed: Brain, moving: Brain, matrix: Matrix) -> float:
    """Mutual information in nats around the fixed brain; 0 where the images hardly overlap."""
    method = _method(_grown(fixed.mask))
    method.SetInitialTransform(to_transform(matrix), inPlace=False)
    try:
        return -float(method.MetricEvaluate(fixed.image, moving.image))
    except RuntimeError:  # too few samples lie inside the moving image
        return 0.0


def best_start(fixed: Brain, moving: Brain, starts: Iterable[Matrix]) -> Matrix:
    """The best of `fits`."""
    return max(fits(fixed, moving, starts), key=lambda matrix: information(fixed, moving, matrix))


def fits(fixed: Brain, moving: Brain, starts: Iterable[Matrix]) -> list[Matrix]:
    """The best places near the best of the starts; which may lie far from them, where nothing held them."""
    ranked = sorted(starts, key=lambda start: -information(fixed, moving, start))[:_FEW]
    return [_fit(fixed, moving, start, SEARCH_MM) for start in ranked]


def _fit(fixed: Brain, moving: Brain, start: Matrix, level_mm: float) -> Matrix:
    """The best place near a start; the start itself where the images hardly overlap.

    Outlines lead to the brain from afar. They depend on masks, though, which may be off by a voxel or, where they were
    copied from one image to the next, by as much as the patient moved, so the last word has what is inside. The
    gradient of sampled mutual information in thick slices leads astray; Powell's method needs none.
    """
    mask = _grown(fixed.mask) if level_mm >= _GROWN_FROM_MM else _inner(fixed.mask)
    method = _method(mask, _SAMPLES.get(level_mm, 1.0))
    method.SetOptimizerAsPowell(
        numberOfIterations=_POWELL_ITERATIONS,
        maximumLineIterations=20,
        stepLength=level_mm / 2,
        stepTolerance=0.02,
        valueTolerance=1e-5,
    )
    method.SetOptimizerScalesFromPhysicalShift()
    transform, centre = to_transform(start), centre_of(fixed.mask)
    offset = to_matrix(transform)
    transform.SetCenter(centre.tolist())
    # A rotation about a centre: x -> R (x - c) + c + t, with t chosen so that the movement is the same.
    transform.SetTranslation((offset[:3, :3] @ centre + offset[:3, 3] - centre).tolist())
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(fixed.image, moving.image)
    except RuntimeError:  # too few samples lie inside the moving image
        return start
    return to_matrix(transform)


def _method(mask: sitk.Image, share: float = 1.0) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricFixedMask(mask)
    if share < 1:
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(share, _SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetNumberOfThreads(_THREADS)
    return method


def _grown(mask: sitk.Image) -> sitk.Image:
    return sitk.BinaryDilate(mask, _voxels(_MARGIN_MM, mask))


def _inner(mask: sitk.Image) -> sitk.Image:
    return sitk.BinaryErode(mask, [int(_RIM_MM / mm) for mm in mask.GetSpacing()])


def coarser(brain: Brain, level_mm: float) -> Brain:
    """The same at a coarser resolution, smoothed accordingly."""
    factors = _voxels(level_mm, brain.image)
    if max(factors) == 1:
        return brain
    mask = sitk.BinShrink(sitk.Cast(brain.mask, sitk.sitkFloat32), factors) >= 0.5
    return Brain(sitk.BinShrink(brain.image, factors), mask)


def _voxels(length_mm: float, image: sitk.Image) -> list[int]:
    """How many voxels come nearest to a length along each axis, at least one; the more, where two are as near.

    Headers hold spacings as float32, so the half is met a little early: voxels of 0.8 and of 0.80000001 mm count alike.
    """
    return [max(1, int(length_mm / mm + 0.5 + _HALF)) for mm in image.GetSpacing()]


def centre_of(mask: sitk.Image) -> npt.NDArray[np.float64]:
    """Centre of mass of a brain, LPS mm."""
    z, y, x = (float(index.mean()) for index in np.nonzero(sitk.GetArrayViewFromImage(mask)))
    return np.asarray(mask.TransformContinuousIndexToPhysicalPoint((x, y, z)))


def _overlap(fixed: Brain, moving: Brain, matrix: Matrix) -> float:
    """Dice of the masks, on the grid of the fixed image."""
    other = sitk.Cast(moving.mask, sitk.sitkFloat32)
    moved = sitk.Resample(other, fixed.mask, to_transform(matrix), sitk.sitkLinear, 0.0) >= 0.5
    # The fixed image ends a little around its brain, so what is beyond is counted by volume.
    first, both = (sitk.GetArrayViewFromImage(mask) > 0 for mask in (fixed.mask, moved))
    volumes = [np.count_nonzero(first), _millilitres(moving.mask) / _millilitres(fixed.mask) * np.count_nonzero(first)]
    return float(2 * np.count_nonzero(first & both) / sum(volumes))


def _millilitres(mask: sitk.Image) -> float:
    return float(np.count_nonzero(sitk.GetArrayViewFromImage(mask)) * np.prod(mask.GetSpacing()) / 1000)


# Starts


def _small_turns() -> list[npt.NDArray[np.float64]]:
    """No turn, and turns about one axis each."""
    return [np.eye(3), *(_turn(axis, degrees) for axis in range(3) for degrees in _TURNS_DEG)]


def quarter_turns() -> list[npt.NDArray[np.float64]]:
    """All 24 rotations of a cube but none at all."""
    signed = (
        np.diag(signs) @ np.eye(3)[list(order)]
        for order in permutations(range(3))
        for signs in product((1.0, -1.0), repeat=3)
    )
    return [turn for turn in signed if np.linalg.det(turn) > 0 and not np.array_equal(turn, np.eye(3))]


def _turn(axis: int, degrees: float) -> npt.NDArray[np.float64]:
    angle = np.deg2rad(degrees)
    first, second = (axis + 1) % 3, (axis + 2) % 3
    turn = np.eye(3)
    turn[first, first] = turn[second, second] = np.cos(angle)
    turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
    return turn


def about(turn: npt.NDArray[np.float64], centre: npt.NDArray[np.float64]) -> Matrix:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = turn, centre - turn @ centre
    return matrix
