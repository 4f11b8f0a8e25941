"""What befalls the images that are given, and what all of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import samples
from torch.utils.data import default_collate

from cwdm.errors import SettingsError
from cwdm.training.augment import MARGIN, AugmentSettings, augment
from cwdm.training.data import assemble
from cwdm.training.settings import DataSettings, load_training_settings

EVERYTHING: dict[str, Any] = {
    "probability": 1.0,
    "rotation_deg": [1.0, 2.0],
    "shift_mm": [1.0, 2.0],
    "slice_mm": [3.0, 6.0],
    "bias": [0.1, 0.3],
    "noise": [0.02, 0.05],
    "gamma": [0.7, 1.4],
    "scanner": [0.2, 0.4],
}
SHARED: dict[str, Any] = {"mask_mm": [-4.0, 4.0], "flips": ["x", "y", "z"]}
SHAPE, SPACING_MM = (26, 31, 28), (1.0, 1.2, 1.5)
INSIDE = (..., *(slice(MARGIN, -MARGIN),) * 3)


def patient(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three contrasts of one ball, brightest at about 900, and the ball."""
    points = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    mask = np.linalg.norm(points, axis=0) < 0.8
    volumes = np.random.default_rng(seed).uniform(300, 900, (3, *SHAPE)).astype(np.float32)
    return volumes * mask, mask


def changed(seed: int, given: list[bool], number: int = 0, **chosen: Any) -> np.ndarray:
    brightest = np.full(3, 900, np.float32)
    rng = np.random.default_rng([seed, number])
    return augment(patient(seed)[0], np.array(given), brightest, SPACING_MM, AugmentSettings(**chosen), rng)


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.lists(st.booleans(), min_size=3, max_size=3))
def test_only_given_images_are_changed_and_the_background_stays_0(seed: int, given: list[bool]) -> None:
    volumes, mask = patient(seed)
    result = changed(seed, given, **EVERYTHING)
    assert result.dtype == np.float32
    for k, worse in enumerate(given):
        assert np.array_equal(result[k], volumes[k][INSIDE]) is not worse
    assert not result[:, ~mask[INSIDE]].any()
    assert np.isfinite(result).all()


@settings(max_examples=10)
@given(st.integers(0, 2**32))
def test_one_seed_one_result_and_another_another(seed: int) -> None:
    given = [True, True, False]
    first = changed(seed, given, **EVERYTHING, **SHARED)
    np.testing.assert_array_equal(first, changed(seed, given, **EVERYTHING, **SHARED))
    assert not np.array_equal(first, changed(seed, given, number=1, **EVERYTHING, **SHARED))


def test_each_image_is_changed_in_its_own_way() -> None:
    one = patient(3)[0][:1].repeat(3, axis=0)
    rng, given = np.random.default_rng(3), np.array([True, True, True])
    settings = AugmentSettings(**EVERYTHING)
    first, second, third = augment(one, given, np.full(3, 900, np.float32), SPACING_MM, settings, rng)
    assert not np.allclose(first, second)
    assert not np.allclose(second, third)


def test_the_mask_and_the_side_are_the_same_for_all() -> None:
    given, masks = [True, False, False], set()
    for number in range(12):
        result = changed(1, given, number, probability=1.0, **SHARED)
        inside = result > 0
        assert all(np.array_equal(inside[0], inside[k]) for k in (1, 2))
        masks.add(inside[0].sum())
    before = patient(1)[1][INSIDE].sum()
    assert min(masks) < before < max(masks)


def test_images_do_not_end_darker_where_they_were_moved() -> None:
    flat = patient(1)[1] * np.full((3, *SHAPE), 500, np.float32)
    settings = AugmentSettings(probability=1.0, rotation_deg=[2, 2], shift_mm=[2, 2], slice_mm=[5, 5])
    given, rng = np.array([True] * 3), np.random.default_rng(0)
    result = augment(flat, given, np.full(3, 900, np.float32), SPACING_MM, settings, rng)
    np.testing.assert_allclose(result, flat[INSIDE], rtol=1e-4)


def test_what_lies_beyond_the_end_of_a_volume_stays_what_becomes_0() -> None:
    volumes, mask = patient(2)
    volumes[:, :6][:, ~mask[:6]] = -3
    settings = AugmentSettings(**EVERYTHING, mask_mm=[-2.0, -2.0])
    given, rng = np.array([True, True, False]), np.random.default_rng(0)
    result = augment(volumes, given, np.full(3, 900, np.float32), SPACING_MM, settings, rng)
    outside = ~mask[INSIDE]
    np.testing.assert_array_equal(result[:, outside], volumes[INSIDE][:, outside])


def sample(source: Any, n: int) -> dict[str, torch.Tensor]:
    return assemble(default_collate([source[n]]), source.settings, torch.device("cpu"))


def test_samples_have_worse_conditions_and_the_same_target(phantoms: Path, tmp_path: Path) -> None:
    plain = {"path": phantoms, "condition_on": "any", "window": "brain", "crop": [16, 16, 16], "most_missing": 2}
    before = samples(DataSettings(**plain), tmp_path)
    after = samples(DataSettings(**plain, augment=AugmentSettings(**EVERYTHING)), tmp_path)
    assert before[0]["voxels"].dtype == torch.int16
    assert after[0]["voxels"].dtype == torch.float32
    for n in range(4):
        old, new, again = sample(before, n), sample(after, n), sample(after, n)
        assert new["volume"].equal(old["volume"])
        assert new["t"].equal(old["t"])
        assert new["noise"].equal(old["noise"])
        shown = before[n]["shown"]
        for k in range(4):
            assert new["conditions"][:, k].equal(old["conditions"][:, k]) is not bool(shown[k])
        assert new["conditions"].equal(again["conditions"])


def test_whole_volumes_and_one_target_are_augmented_too(phantoms: Path, tmp_path: Path) -> None:
    plain = {"path": phantoms, "target": "t2w", "window": [32, 32, 32]}
    before = sample(samples(DataSettings(**plain), tmp_path), 0)
    after = sample(samples(DataSettings(**plain, augment=AugmentSettings(**EVERYTHING)), tmp_path), 0)
    assert after["volume"].equal(before["volume"])
    assert after["conditions"].shape == before["conditions"].shape
    assert not after["conditions"].equal(before["conditions"])


def test_ranges_are_checked_by_name(tmp_path: Path) -> None:
    common = [f"data.path={tmp_path}", f"out={tmp_path}"]
    for wrong in ("shift_mm=[2,1]", "slice_mm=[1,99]", "gamma=[0,1]", "flips=[w]", "colour=[0,1]"):
        with pytest.raises(SettingsError, match=f"data.augment.{wrong.split('=')[0]}"):
            load_training_settings("cwdm-any", [*common, f"data.augment.{wrong}"])
    settings = load_training_settings("cwdm-any", [*common, "data.augment.slice_mm=[1,6]"])
    assert settings.data.augment.slice_mm == [1, 6]
    assert settings.data.augment.happens
    assert not load_training_settings("cwdm-any", common).data.augment.happens


def test_curves_leave_what_the_brain_is_scaled_by(phantoms: Path, tmp_path: Path) -> None:
    """Inference scales every scanner's image to it, so it would be wrong to show the network others."""
    plain = {"path": phantoms, "target": "t2w", "window": "brain", "intensities": "brain"}
    before = sample(samples(DataSettings(**plain), tmp_path), 0)["conditions"]
    curves = AugmentSettings(probability=1.0, gamma=[2.0, 2.0], scanner=[0.3, 0.3])
    after = sample(samples(DataSettings(**plain, augment=curves), tmp_path), 0)["conditions"]
    at_reference = abs(before - 0.5) < 0.02
    assert at_reference.any()
    torch.testing.assert_close(after[at_reference], before[at_reference], atol=0.08, rtol=0)
    assert abs(after - before).max() > 0.1
