"""The figures of images of other kinds, such as CT made from MR by `cwdm translate`, in the target's own units.

As the SynthRAD challenges score synthetic CT: mean absolute error inside the body, and PSNR and SSIM there of both
images clipped to one range of intensities.
"""

from pathlib import Path

import numpy as np
from pydantic import ValidationError
from scipy import ndimage

from cwdm import metrics
from cwdm.errors import CaseError, InputError, SettingsError
from cwdm.evaluation.score import Pair, Score
from cwdm.images import Affine, Image, ImageSettings, Volume, in_order_of, list_folder, list_subjects, read_grid

Mask = metrics.Mask

_ENDING = ".nii.gz"
_BINS = 256  # of the histogram that tells a body from air


def find_translated(predictions: Path, truth: Path, truth_file: str, mask_file: str | None = None) -> list[Pair]:
    """Pair the images of a flat folder with the true ones, sorted by case; no image is opened.

    A case with a true image and no synthesised one is a pair with a problem, as in `scoring.find_pairs`.

    Args:
        predictions: flat folder of <case>.nii.gz, as `cwdm translate` writes it.
        truth_file, mask_file: paths inside `truth` with {case} where the case's name stands.

    Raises:
        InputError: a folder is missing or cannot be read, or no image is found.
        SettingsError: a path leads out of the folder.
    """
    made = {
        path.name.removesuffix(_ENDING): path
        for path in list_folder(predictions, "images")
        if path.name.endswith(_ENDING) and not path.name.startswith(".")
    }
    if not made:
        raise InputError(f"no image in {predictions}; expected <case>{_ENDING}, as 'cwdm translate' writes them")
    true = _true_files(truth, truth_file, mask_file)
    pairs = []
    for case in sorted(made.keys() | true.keys()):
        files = true.get(case)
        if files is None:
            problem = f"expected its true image {truth_file.replace('{case}', case)} in {truth}, found none"
            pairs.append(Pair(case, "", made[case], problem=problem))
        elif case not in made:
            pairs.append(Pair(case, "", predictions, problem=f"no synthesised image of it in {predictions}"))
        else:
            pairs.append(Pair(case, "", made[case], files[0], seg=files[1] if mask_file else None))
    return pairs


def score_translated(pair: Pair, value_range: tuple[float, float] | None = None) -> Score:
    """The figures of one image.

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
    figures = {"target_mae": metrics.mae(prediction, truth.volume, mask)}
    # What lies outside the mask must not reach into the windows of SSIM: it is set to the range's lower end, here 0.
    x, y = (np.where(mask, np.clip(volume, low, high) - low, 0) for volume in (prediction, truth.volume))
    figures["target_psnr"] = metrics.psnr(x, y, mask, high - low)
    try:
        inner = mask & metrics.interior(mask.shape, metrics.UNIFORM)
        figures["target_ssim"] = metrics.ssim(x, y, inner, high - low, metrics.UNIFORM)
    except ValueError as error:
        return Score(pair.case, "", figures, notes=(f"no SSIM: {error}",))
    return Score(pair.case, "", figures)


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


def _true_files(truth: Path, *patterns: str | None) -> dict[str, tuple[Path, ...]]:
    """Case -> its files, by the patterns, of all cases that have the first."""
    list_folder(truth, "true images")
    try:
        images = [ImageSettings(file=pattern) for pattern in patterns if pattern]
    except ValidationError as error:
        fault = error.errors()[0]["msg"]
        raise SettingsError(f"{' and '.join(filter(None, patterns))}: {fault}") from error
    return {subject.name: tuple(subject.files) for subject in list_subjects(truth, images)}


def _read_like(pair: Pair, path: Path, truth: Image) -> Volume:
    return in_order_of(truth, read_grid(path), pair.case, ("the true image", path.name))
