"""The score of images of other kinds, such as CT made from MR by `cwdm translate`, in the target's own units.

As the SynthRAD challenges score synthetic CT: mean absolute error inside the body, and PSNR and SSIM there of both
images clipped to one range of intensities.
"""

from pathlib import Path

import numpy as np
from scipy import ndimage

from cwdm.arrays import Affine, Mask, Volume
from cwdm.errors import CaseError, InputError
from cwdm.evaluation.pairs import Pair
from cwdm.evaluation.score import Score
from cwdm.images import Image, in_order_of, read_grid
from cwdm.metrics import UNIFORM, interior, mae, psnr, ssim

_BINS = 256  # of the histogram that tells a body from air


def score_translated(pair: Pair, value_range: tuple[float, float] | None = None) -> Score:
    """The score of one image.

    Args:
        pair: its `seg` is the mask, not 0 where the image is scored; without it the body in the true image.
        value_range: intensities that PSNR and SSIM refer to, such as (-1024, 3000) HU; None for the true image's.

    Raises:
        CaseError: a file is missing or damaged, sizes or grids differ, or there is nothing to compare.
    """
    if pair.truth is None:
        raise CaseError(pair.case, pair.problem)
    try:
        truth = read_grid(pair.truth)
        prediction = _read_like(pair, pair.prediction, truth)
        mask = _read_like(pair, pair.seg, truth) != 0 if pair.seg else body_mask(truth.volume, truth.affine)
        low, high = value_range or (float(truth.volume.min()), float(truth.volume.max()))
        if not mask.any() or low == high:
            empty = f"{pair.seg}: is 0 everywhere" if pair.seg else f"{pair.truth}: every voxel is {low:g}"
            raise CaseError(pair.case, f"{empty}; there is nothing to compare")
    except InputError as error:
        raise CaseError(pair.case, str(error)) from error
    metrics = {"target_mae": mae(prediction, truth.volume, mask)}
    # What lies outside the mask must not reach into the windows of SSIM: it is set to the range's lower end, here 0.
    x, y = (np.where(mask, np.clip(volume, low, high) - low, 0) for volume in (prediction, truth.volume))
    metrics["target_psnr"] = psnr(x, y, mask, high - low)
    try:
        inner = mask & interior(mask.shape, UNIFORM)
        metrics["target_ssim"] = ssim(x, y, inner, high - low, UNIFORM)
    except ValueError as error:
        return Score(pair.case, "", metrics, notes=(f"no SSIM: {error}",))
    return Score(pair.case, "", metrics)


def body_mask(volume: Volume, affine: Affine) -> Mask:
    """The body in an image (X, Y, Z): the largest part that is brighter than air, with what it encloses in a slice.

    Air and body are told apart by Otsu's threshold (1979). Empty if all voxels are equal.

    Args:
        affine: (4, 4), voxel indices to mm; says which slices are axial.
    """
    bright = volume > otsu_threshold(volume)
    parts, count = ndimage.label(bright)
    if not count:
        return bright
    body = parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    vertical = int(np.argmax(np.abs(affine[2, :3]) / np.linalg.norm(affine[:3, :3], axis=0)))
    slices = np.moveaxis(body, vertical, 0)  # a view: lungs are open to the air in 3D, not in an axial slice
    for index, piece in enumerate(slices):
        slices[index] = ndimage.binary_fill_holes(piece)
    return body


def otsu_threshold(volume: Volume) -> float:
    """The threshold that parts a histogram of 256 bins into the two classes whose means differ most (Otsu, 1979).

    The value itself where all are equal.
    """
    if volume.min() == volume.max():
        return float(volume.flat[0])
    counts, edges = np.histogram(volume, _BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    below, sums = np.cumsum(counts)[:-1], np.cumsum(counts * centres)
    above = counts.sum() - below
    # Both are above 0: the outermost bins hold the smallest and the largest value.
    between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    return float(centres[int(np.argmax(between))])


def _read_like(pair: Pair, path: Path, truth: Image) -> Volume:
    return in_order_of(truth, read_grid(path), pair.case, ("the true image", path.name))
