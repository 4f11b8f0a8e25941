"""Overlap, distances and lesions against MONAI, by hand and one by one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_dice, compute_hausdorff_distance
from scipy.ndimage import gaussian_filter
from skimage.measure import label

from cwdm.evaluation.overlap import count_lesions, dice, hd95, lesionwise

SHAPE = (13, 17, 11)
SPACING = (1.0, 1.5, 0.8)


def blobs(seed: int) -> np.ndarray:
    return gaussian_filter(np.random.RandomState(seed).standard_normal(SHAPE), 1.5) > 0.1


def as_tensor(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(mask)[None, None]


@pytest.mark.parametrize("seed", range(4))
def test_against_monai(seed: int) -> None:
    a, b = blobs(seed), blobs(seed + 100)
    assert dice(a, b) == pytest.approx(compute_dice(as_tensor(a), as_tensor(b)).item(), abs=1e-6)
    expected = compute_hausdorff_distance(
        as_tensor(a), as_tensor(b), include_background=True, percentile=95, spacing=list(SPACING)
    )
    assert hd95(a, b, SPACING) == pytest.approx(expected.item(), abs=1e-4)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_laws(first: int, second: int) -> None:
    a, b = blobs(first), blobs(second)
    assert dice(a, a) == 1
    assert hd95(a, a, SPACING) == 0
    assert count_lesions(a, a)[:2] == (0, 0)
    assert dice(a, b) == dice(b, a)
    assert hd95(a, b, SPACING) == hd95(b, a, SPACING)
    assert count_lesions(a, b)[:2] == count_lesions(b, a)[1::-1]


def test_by_hand() -> None:
    a, b = np.zeros((2, *SHAPE), bool)
    a[2:4, 3, 3] = a[8, 8, 8] = True
    b[3, 3, 3] = b[11, 15, 9] = b[10, 14, 8] = b[6, 6, 1] = True
    assert dice(a, b) == 2 * 1 / (3 + 4)
    assert count_lesions(a, b) == (2, 1, 3)  # the two corner neighbours are one lesion
    one, other = np.zeros((2, *SHAPE), bool)
    one[2, 3, 4] = other[2, 7, 4] = True
    assert hd95(one, other, SPACING) == 4 * 1.5


def test_empty_masks() -> None:
    none, some = np.zeros(SHAPE, bool), blobs(0)
    assert (dice(none, none), hd95(none, none, SPACING), count_lesions(none, none)) == (1, 0, (0, 0, 0))
    assert dice(none, some) == dice(some, none) == 0
    diagonal = np.linalg.norm([12 * 1.0, 16 * 1.5, 10 * 0.8])
    assert hd95(none, some, SPACING) == hd95(some, none, SPACING) == pytest.approx(diagonal)


def balls(seed: int, shape: tuple[int, int, int] = (26, 31, 22), count: int = 7) -> np.ndarray:
    random = np.random.RandomState(seed)
    places = np.moveaxis(np.indices(shape), 0, -1)
    centres, radii = random.uniform(0, shape, (count, 3)), random.uniform(0.9, 4, count)
    return np.any([np.linalg.norm(places - c, axis=-1) < r for c, r in zip(centres, radii, strict=True)], axis=0)


def lesionwise_one_by_one(prediction: np.ndarray, truth: np.ndarray, spacing: tuple) -> tuple[float, ...]:
    """By scikit-image, voxel distances and sets, one lesion after the other."""
    offsets = np.argwhere(np.ones((3, 3, 3))) - 1
    steps = [offset for offset in offsets if np.abs(offset).sum() <= 2]

    def grow(mask: np.ndarray) -> np.ndarray:
        for _ in range(3):
            padded = np.pad(mask, 1)
            mask = np.any([np.roll(padded, step, (0, 1, 2))[1:-1, 1:-1, 1:-1] for step in steps], axis=0)
        return mask

    def parts(mask: np.ndarray) -> list[np.ndarray]:
        numbered = label(mask, connectivity=3)
        return [numbered == number for number in range(1, numbered.max() + 1)]

    found, met, scores, missed = parts(prediction), set(), [], 0
    for near in parts(grow(truth)):
        lesion = truth & near
        touching = [n for n, part in enumerate(found) if (part & near).any()]
        met |= set(touching)
        if lesion.sum() * np.prod(spacing) <= 50:
            continue
        if touching:
            whole = np.any([found[n] for n in touching], axis=0)
            scores.append((dice(whole, lesion), hd95(whole, lesion, spacing)))
        else:
            missed += 1
            scores.append((0, 374))
    scored, false = len(scores), len(found) - len(met)
    scores += [(0, 374)] * false
    return (*(np.mean(scores, axis=0) if scores else (1, 0)), scored, missed, false)


@pytest.mark.parametrize("seed", range(6))
def test_lesionwise_against_lesions_one_by_one(seed: int) -> None:
    truth = balls(seed)
    prediction = (balls(seed, count=5) & ~balls(seed + 50, count=2)) | balls(seed + 100, count=2)
    assert lesionwise(prediction, truth, SPACING) == pytest.approx(lesionwise_one_by_one(prediction, truth, SPACING))


def test_lesionwise_by_hand() -> None:
    truth, prediction = np.zeros((2, 40, 20, 20), bool)
    truth[2:7, 5:10, 5:10] = truth[10:15, 5:10, 5:10] = True  # 3 voxels apart: one lesion of 250 voxels
    truth[32:37, 5:10, 5:10] = True  # missed
    truth[22, 16, 16] = prediction[22, 17, 17] = True  # too small to be scored, and what meets it is not false
    prediction[2:7, 5:10, 5:10] = True
    prediction[25, 2, 2] = True  # false, however small
    assert dice(prediction[:20], truth[:20]) == pytest.approx(2 / 3)
    found = lesionwise(prediction, truth, (1, 1, 1))
    assert found == (pytest.approx((2 / 3 + 0 + 0) / 3), pytest.approx((8 + 374 + 374) / 3), 2, 1, 1)
    none = np.zeros_like(truth)
    assert lesionwise(none, none, SPACING) == (1, 0, 0, 0, 0)
    assert lesionwise(truth, none, SPACING) == (0, 374, 0, 0, 4)
    assert lesionwise(none, truth, SPACING) == (0, 374, 2, 2, 0)
    assert lesionwise(truth, truth, SPACING) == (1, 0, 2, 0, 0)
    assert lesionwise(truth, truth, (0.4, 0.5, 0.5)).scored == 0  # 25 mm³ and 12.5 are small
