"""Segmentations against each other: Dice, HD95, lesions found and missed, and the lesion-wise scores of BraTS."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from cwdm.arrays import Mask, bounding_box
from cwdm.evaluation.labels import SCHEMES, TODAY, Scheme

PENALTY_MM = 374.0
"""HD95 of a lesion that is missed or added: the diagonal of a BraTS volume, rounded."""

_GROWTH = 3  # voxels: lesions of the reference that are nearer than twice this count as one
_SMALLEST_MM3 = 50.0  # lesions of the reference up to this are not scored
_GROWN = ndimage.generate_binary_structure(3, 2)  # by the 18 neighbours
_TOUCHING = np.ones((3, 3, 3), np.bool_)  # 26 neighbours


def compare_with_true_case(
    completed: npt.NDArray[np.generic],
    true: npt.NDArray[np.generic],
    spacing_mm: npt.ArrayLike,
    scheme: Scheme = SCHEMES[TODAY],
) -> dict[str, float]:
    """What the synthesised image changed for the segmenter.

    Args:
        completed, true: labels (X, Y, Z) of the completed and of the true case.

    Returns:
        dice_R, hd95_R (mm), lesions_true_R, lesions_missed_R and lesions_added_R for each region R of the scheme.
    """
    metrics: dict[str, float] = {}
    for region, labels in scheme.items():
        masks = np.isin(completed, labels), np.isin(true, labels)
        missed, added, lesions = count_lesions(*masks)
        metrics |= {
            f"dice_{region}": dice(*masks),
            f"hd95_{region}": hd95(*masks, spacing_mm),
            f"lesions_true_{region}": lesions,
            f"lesions_missed_{region}": missed,
            f"lesions_added_{region}": added,
        }
    return metrics


def compare_with_reference(
    completed: npt.NDArray[np.generic],
    reference: npt.NDArray[np.generic],
    spacing_mm: npt.ArrayLike,
    scheme: Scheme = SCHEMES[TODAY],
) -> dict[str, float]:
    """The segmentation of the completed case against the reference, as participants are scored.

    Args:
        completed, reference: labels (X, Y, Z) of one grid and voxel order.

    Returns:
        reference_dice_R, reference_lesionwise_dice_R, reference_lesionwise_hd95_R (mm), reference_lesions_R,
        reference_lesions_missed_R and reference_lesions_false_R for each region R of the scheme.
    """
    metrics: dict[str, float] = {}
    for region, labels in scheme.items():
        masks = np.isin(completed, labels), np.isin(reference, labels)
        lesions = lesionwise(*masks, spacing_mm)
        metrics |= {
            f"reference_dice_{region}": dice(*masks),
            f"reference_lesionwise_dice_{region}": lesions.dice,
            f"reference_lesionwise_hd95_{region}": lesions.hd95_mm,
            f"reference_lesions_{region}": lesions.scored,
            f"reference_lesions_missed_{region}": lesions.missed,
            f"reference_lesions_false_{region}": lesions.false,
        }
    return metrics


class Lesionwise(NamedTuple):
    """Means over the lesions of a reference and those that a segmentation adds.

    Attributes:
        dice: 1 where there is neither.
        hd95_mm: 0 where there is neither.
        scored: lesions of the reference that are large enough.
        missed: of those, how many no lesion of the segmentation comes near.
        false: lesions of the segmentation that come near none of the reference, however small.
    """

    dice: float
    hd95_mm: float
    scored: int
    missed: int
    false: int


def lesionwise(prediction: Mask, truth: Mask, spacing_mm: npt.ArrayLike) -> Lesionwise:
    """Lesion-wise Dice and HD95 as the BraTS challenges describe them since 2023, with their numbers for glioma.

    Lesions are 26-connected components. Those of the truth that grow into each other when they are dilated by three
    voxels are one lesion. All lesions of the prediction that touch its dilated shape are held against it together;
    a lesion that is met by none has Dice 0 and HD95 PENALTY_MM, and so has each lesion of the prediction that meets
    none. Lesions of the truth of 50 mm³ or less are left out, and so is what meets only them.
    """
    if not (prediction.any() or truth.any()):
        return Lesionwise(dice=1.0, hd95_mm=0.0, scored=0, missed=0, false=0)
    spacing = np.asarray(spacing_mm, np.float64)
    box = bounding_box(prediction | truth, _GROWTH)
    prediction, truth = prediction[box], truth[box]
    grown, count = ndimage.label(ndimage.binary_dilation(truth, _GROWN, _GROWTH), _TOUCHING)
    predicted, predicted_count = ndimage.label(prediction, _TOUCHING)
    volumes_mm3 = np.bincount(grown[truth], minlength=count + 1) * spacing.prod()
    met = np.zeros(predicted_count + 1, np.bool_)
    scores: list[tuple[float, float]] = []
    missed = 0
    for number in range(1, count + 1):
        near = grown == number
        matches = np.zeros_like(met)
        matches[predicted[near]] = True
        matches[0] = False
        met |= matches
        if volumes_mm3[number] <= _SMALLEST_MM3:
            continue
        found, lesion = matches[predicted], truth & near
        missed += not matches.any()
        scores.append((dice(found, lesion), hd95(found, lesion, spacing) if matches.any() else PENALTY_MM))
    false = predicted_count - int(np.count_nonzero(met))
    scores += [(0.0, PENALTY_MM)] * false
    mean_dice, mean_hd95 = np.mean(scores, axis=0) if scores else (1.0, 0.0)
    return Lesionwise(float(mean_dice), float(mean_hd95), len(scores) - false, missed, false)


def dice(prediction: Mask, truth: Mask) -> float:
    """Dice coefficient 2|A∩B| / (|A| + |B|) of two masks; 1 if both are empty."""
    voxels = int(np.count_nonzero(prediction) + np.count_nonzero(truth))
    return 2 * int(np.count_nonzero(prediction & truth)) / voxels if voxels else 1.0


def hd95(prediction: Mask, truth: Mask, spacing_mm: npt.ArrayLike) -> float:
    """Hausdorff distance at the 95th percentile in mm: the larger of the two directed percentiles.

    Distances go from each voxel of one surface (mask without its erosion by the 6 neighbours) to the nearest of
    the other. 0 if both masks are empty; if one is, the diagonal of the volume, the largest distance there could be.
    """
    spacing = np.asarray(spacing_mm, np.float64)
    if not (prediction.any() and truth.any()):
        diagonal = float(np.linalg.norm((np.array(truth.shape) - 1) * spacing))
        return 0.0 if prediction.any() == truth.any() else diagonal
    box = bounding_box(prediction | truth)
    surfaces = [_surface(np.pad(mask[box], 1)) for mask in (prediction, truth)]
    directed = (_distances(a, b, spacing) for a, b in (surfaces, reversed(surfaces)))
    return max(float(np.percentile(distances, 95)) for distances in directed)


def count_lesions(prediction: Mask, truth: Mask) -> tuple[int, int, int]:
    """How many lesions of the truth are missed, how many of the prediction are added, and how many the truth has.

    A lesion is a component of voxels that share a face, an edge or a corner; one voxel in common makes two match.
    """
    true_lesions, count = ndimage.label(truth, _TOUCHING)
    found = np.unique(true_lesions[prediction & truth]).size
    predicted, predicted_count = ndimage.label(prediction, _TOUCHING)
    matched = np.unique(predicted[prediction & truth]).size
    return count - found, predicted_count - matched, count


def _surface(mask: Mask) -> Mask:
    surface: Mask = mask & ~ndimage.binary_erosion(mask)
    return surface


def _distances(of: Mask, to: Mask, spacing: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    distances: npt.NDArray[np.float64] = ndimage.distance_transform_edt(~to, sampling=spacing)[of]
    return distances
