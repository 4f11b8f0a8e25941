"""Laws of intensities, with NumPy as oracle."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cwdm.images.intensity import (
    TYPICAL_LEVEL,
    ClipRange,
    Rule,
    _quantiles,
    as_published,
    brain_mask,
    clip_range,
    denormalise,
    foreground,
    normalise,
    with_tail,
)

shapes = st.tuples(*[st.integers(1, 9)] * 3)
volumes = hnp.arrays(
    np.float32, shapes, elements=st.floats(-1e6, 1e6, width=32) | st.just(0.0) | st.integers(-3, 3), fill=st.just(0.0)
)


@given(volumes)
def test_quantiles_are_those_of_numpy(volume: np.ndarray) -> None:
    quantiles = (0.0, 0.001, 0.3, 0.5, 0.999, 1.0)
    assert _quantiles(volume, quantiles) == list(np.quantile(volume.astype(np.float64), quantiles))


def test_quantiles_of_a_volume_without_background() -> None:
    volume = np.random.RandomState(0).standard_normal((31, 40, 17)).astype(np.float32)
    for array in (volume, volume + 100, volume - 100, np.asfortranarray(volume)):
        expected = np.quantile(array.astype(np.float64), (0.001, 0.999))
        assert _quantiles(array, (0.001, 0.999)) == list(expected)


@given(volumes)
def test_normalise_reaches_both_ends_and_goes_back(volume: np.ndarray) -> None:
    low, high = np.quantile(volume.astype(np.float64), (0.001, 0.999)).astype(np.float32)
    assume(low < high)
    before = volume.copy()
    unit, clip_range = normalise(volume)
    np.testing.assert_array_equal(volume, before)
    assert unit.dtype == np.float32
    assert unit.min() == 0
    assert unit.max() == 1
    assert clip_range == ClipRange(float(low), float(high))
    rounding = 4 * np.finfo(np.float32).eps * max(abs(low), abs(high))
    np.testing.assert_allclose(denormalise(unit, clip_range), np.clip(volume, low, high), rtol=0, atol=rounding)


def test_normalise_is_as_exact_as_float64() -> None:
    volume = np.random.RandomState(1).gamma(2, 300, (23, 19, 14)).astype(np.float32)
    low, high = np.quantile(volume.astype(np.float64), (0.001, 0.999))
    expected: np.ndarray = (np.clip(volume.astype(np.float64), low, high) - low) / (high - low)
    np.testing.assert_allclose(normalise(volume)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [0, 7.5, -3])
def test_normalise_refuses_a_constant(value: float) -> None:
    volume = np.full((10, 11, 12), value, np.float32)
    volume[3, 4, 5] = 1000  # one voxel does not reach the percentiles
    with pytest.raises(ValueError, match="same intensity"):
        normalise(volume)


def test_denormalise_goes_beyond_the_range() -> None:
    unit = np.array([-0.1, 0, 0.5, 1, 1.1], np.float32)
    np.testing.assert_allclose(denormalise(unit, ClipRange(10, 110)), [0, 10, 60, 110, 120], rtol=1e-6)


def test_brain_mask_is_the_union_of_what_is_not_zero() -> None:
    first, second = np.zeros((2, 3, 4, 5), np.float32)
    first[0, 0, 0] = -2
    second[2, 3, 4] = 1e-3
    second[1, 1, 1] = -0.0
    mask = brain_mask([first, second])
    assert mask.dtype == np.bool_
    assert np.argwhere(mask).tolist() == [[0, 0, 0], [2, 3, 4]]


def test_background_rules() -> None:
    unit = np.array([[[-0.1, 0.04, 0.05, 0.9]]], np.float32)
    mask = np.array([[[True, False, False, True]]])
    rules: tuple[Rule, ...] = ("mask", "threshold", "none")
    kept = {rule: foreground(unit, rule, mask, 0.04).ravel().tolist() for rule in rules}
    assert kept == {"mask": [True, False, False, True], "threshold": [False, False, True, True], "none": [True] * 4}


def brain_with_vessels(vessels: float) -> np.ndarray:
    """A brain of 5000 voxels around 500, thirty of which are vessels, in a volume of 13,500."""
    rng = np.random.default_rng(2)
    volume = np.zeros((30, 18, 25), np.float32)
    volume[5:25, 4:14, :] = rng.normal(500, 90, (20, 10, 25)).clip(1)
    volume[6:12, 5:10, 3] = vessels
    return volume


def test_brain_intensities_do_not_hang_on_a_few_bright_voxels() -> None:
    dim, bright = brain_with_vessels(900), brain_with_vessels(9000)
    assert clip_range(bright).high > 5 * clip_range(dim).high
    assert clip_range(bright, "brain") == clip_range(dim, "brain")
    inside = dim[dim != 0]
    unit, (low, high) = normalise(dim, "brain")
    assert low == 0
    assert high == pytest.approx(2 * np.quantile(inside, 0.95), rel=1e-3)
    assert np.all((unit == 0) == (dim == 0))
    np.testing.assert_allclose(denormalise(unit, ClipRange(low, high)), dim, rtol=1e-6)


@given(st.floats(1e-3, 1e3))
def test_brain_intensities_do_not_know_the_scanner(gain: float) -> None:
    volume = brain_with_vessels(900)
    expected, found = normalise(volume, "brain")[0], normalise(volume * np.float32(gain), "brain")[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_brain_intensities_clip_what_interpolation_left_below_0() -> None:
    volume = brain_with_vessels(900)
    volume[5, 4, :5] = -20
    assert normalise(volume, "brain")[0].min() == 0


@pytest.mark.parametrize("value", [0, -3, 3e38])
def test_brain_intensities_need_a_brain(value: float) -> None:
    with pytest.raises(ValueError, match=r"brighter than 0|more than can be scaled"):
        clip_range(np.full((5, 6, 7), value, np.float32), "brain")


def test_the_network_s_range_is_brought_to_that_of_percentiles() -> None:
    unit = normalise(brain_with_vessels(900), "brain")[0]
    for modality, level in TYPICAL_LEVEL.items():
        shown = as_published(unit, modality, "brain")
        assert np.quantile(shown[shown > 0], 0.95) == pytest.approx(level, rel=1e-3)
        assert as_published(unit, modality, "published") is unit


def test_a_prediction_gets_the_percentiles_of_an_acquired_image() -> None:
    truth = normalise(brain_with_vessels(1500))[0]
    dim = np.where(truth > 0, 0.5 * truth + 0.1, 0).astype(np.float32)
    before = dim.copy()
    made = with_tail(dim)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(dim, before)
    assert clip_range(made).high == pytest.approx(1, abs=1e-3)
    unchanged = dim <= np.quantile(dim, 0.99)
    assert not np.array_equal(made, dim)
    np.testing.assert_array_equal(made[unchanged], dim[unchanged])
    order = np.argsort(dim, axis=None)
    assert np.all(np.diff(made.ravel()[order]) >= 0)


def test_where_errors_are_large_the_truth_is_brighter() -> None:
    """The brightest thousandth of a mean with errors, whose size alone is known."""
    rng = np.random.default_rng(1)
    mean = np.where(normalise(brain_with_vessels(1500))[0] > 0, np.float32(0.9), np.float32(0))
    mean[mean > 0] += 0.01 * rng.random(np.count_nonzero(mean)).astype(np.float32)
    std = np.where(mean > 0, np.float32(0.2), np.float32(0))
    truth = mean + std * rng.standard_normal(mean.shape, np.float32)
    made = with_tail(mean, std)
    assert clip_range(made).high == pytest.approx(clip_range(truth).high, rel=0.05)
    assert clip_range(made).high > 1.2
    np.testing.assert_array_equal(made, with_tail(mean, std))
    np.testing.assert_allclose(with_tail(mean, 0 * std), with_tail(mean))


def test_a_bright_prediction_is_not_made_darker() -> None:
    bright = 2 * normalise(brain_with_vessels(1500))[0]
    np.testing.assert_allclose(with_tail(bright), bright, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_prediction_without_a_tail_stays_as_it_is(value: float) -> None:
    volume = np.full((7, 8, 9), value, np.float32)
    assert with_tail(volume) is volume
