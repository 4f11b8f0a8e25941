"""Laws of what is done to images."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from cwdm.arrays import Mask, Volume
from cwdm.training.distort import (
    another_mask,
    biased,
    filled,
    flipped,
    moved,
    noisy,
    rescaled,
    thick_slices,
    with_gamma,
)

SHAPE, SPACING_MM = (20, 23, 17), (1.0, 1.5, 2.0)

seeds = st.integers(0, 2**32)
few = settings(max_examples=25)


def ball(radius: float = 0.7) -> Mask:
    points = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    return np.linalg.norm(points, axis=0) < radius


def image(seed: int) -> Volume:
    """A smooth positive volume, about 1."""
    noise = np.random.default_rng(seed).standard_normal(SHAPE)
    return np.exp(ndimage.gaussian_filter(noise, 2)).astype(np.float32)


IDENTITIES: dict[str, Callable[[Volume], Volume]] = {
    "moved": lambda volume: moved(volume, (0, 0, 0), (0, 0, 0), SPACING_MM),
    "thin slices": lambda volume: thick_slices(volume, 1, 1.5, 1.5),
    "biased": lambda volume: biased(volume, 0, SPACING_MM, np.random.default_rng(0)),
    "noisy": lambda volume: noisy(volume, 0, np.random.default_rng(0)),
    "with_gamma": lambda volume: with_gamma(volume, 1),
    "rescaled": lambda volume: rescaled(volume, [0.0, 0.0, 0.0]),
    "flipped": lambda volume: flipped(volume, []),
    "filled": lambda volume: filled(volume, np.ones(SHAPE, np.bool_)),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_parameters_that_mean_nothing_change_nothing(name: str) -> None:
    np.testing.assert_array_equal(IDENTITIES[name](image(1)), image(1))


@few
@given(seeds, st.lists(st.sampled_from([0, 1, 2]), unique=True))
def test_flipping_twice_is_nothing(seed: int, axes: list[int]) -> None:
    volumes = np.stack([image(seed), image(seed + 1)])
    np.testing.assert_array_equal(flipped(flipped(volumes, axes), axes), volumes)


@few
@given(seeds, st.integers(0, 2), st.floats(1.1, 9), st.floats(0, 1))
def test_thick_slices_keep_constants_limits_and_about_the_mean(
    seed: int, axis: int, slice_mm: float, phase: float
) -> None:
    volume, spacing = image(seed), SPACING_MM[axis]
    thick = thick_slices(volume, axis, slice_mm, spacing, phase)
    assert thick.shape == volume.shape
    assert thick.dtype == np.float32
    assert volume.min() - 1e-5 <= thick.min()
    assert thick.max() <= volume.max() + 1e-5
    flat = np.full(SHAPE, 3.0, np.float32)
    np.testing.assert_allclose(thick_slices(flat, axis, slice_mm, spacing, phase), flat, rtol=1e-5)
    # What stands away from the ends of a long axis is shared out among slices and among voxels again, but not lost.
    column = np.zeros((1, 1, 60), np.float32)
    column[..., 25:35] = np.random.default_rng(seed).random(10)
    kept = thick_slices(column, 2, slice_mm, 1.0, phase)
    assert kept.mean() == pytest.approx(column.mean(), rel=0.35 if slice_mm > 6 else 0.2)


def test_a_slice_is_the_mean_of_what_it_holds() -> None:
    volume = image(2)[:, :21]
    thick = thick_slices(volume, 1, 4.5, 1.5, phase=2 / 9 + 1 / 9)  # slices of voxels 0-2, 3-5, ...
    middles = volume.reshape(SHAPE[0], 7, 3, SHAPE[2]).mean(2)
    np.testing.assert_allclose(thick[:, 1::3], middles, rtol=1e-4)


def test_what_is_moved_by_whole_voxels_is_there() -> None:
    volume = image(3)
    right = moved(volume, (0, 0, 0), (2.0, -3.0, 0.0), SPACING_MM)  # 2 voxels along x, -2 along y
    np.testing.assert_allclose(right[2:, :-2], volume[:-2, 2:], rtol=1e-4)
    np.testing.assert_allclose(right[:2, :-2], np.broadcast_to(volume[:1, 2:], (2, 21, 17)), rtol=1e-4)


def test_a_quarter_turn_turns() -> None:
    volume = np.random.default_rng(4).random((9, 9, 5), np.float32)
    turned = moved(volume, (0, 0, 90), (0, 0, 0), (2.0, 2.0, 3.0))
    np.testing.assert_allclose(turned, np.rot90(volume, 1, (0, 1)), atol=1e-4)


@few
@given(seeds, st.floats(0, 180), st.floats(0, 10))
def test_turning_about_any_axis_and_back_is_nothing_for_smooth_images(seed: int, angle: float, shift: float) -> None:
    """Of a straight slope, which linear interpolation keeps, where nothing came from beyond the border."""
    rng = np.random.default_rng(seed)
    axis = rng.standard_normal(3)
    axis *= min(angle, 20) / np.linalg.norm(axis)
    x, y, z = np.meshgrid(*(np.arange(n) * mm for n, mm in zip(SHAPE, SPACING_MM, strict=True)), indexing="ij")
    slope = (x + 2 * y - z).astype(np.float32)
    there = moved(slope, axis, (0, 0, 0), SPACING_MM)
    back = moved(there, -axis, (0, 0, 0), SPACING_MM)
    inner = (slice(8, -8), slice(9, -9), slice(7, -7))
    np.testing.assert_allclose(back[inner], slope[inner], atol=0.05)
    shifted = moved(slope, (0, 0, 0), (shift / 10, 0, 0), SPACING_MM)
    np.testing.assert_allclose(shifted[inner], slope[inner] - shift / 10, atol=0.01)


@few
@given(seeds, st.lists(st.floats(-2, 2), min_size=1, max_size=6), st.floats(0.2, 4))
def test_curves_rise_and_keep_both_ends(seed: int, log_slopes: list[float], exponent: float) -> None:
    values = np.linspace(0, 1.5, 120, dtype=np.float32).reshape(4, 5, 6)
    for curve in (rescaled(values, log_slopes), with_gamma(values, exponent)):
        assert curve.dtype == np.float32
        assert (np.diff(curve.ravel()) > -1e-6).all()
        assert curve.ravel()[0] == 0
        assert np.interp(1, values.ravel(), curve.ravel()) == pytest.approx(1, abs=0.02)


@few
@given(seeds)
def test_noise_makes_dark_voxels_brighter_as_rice_found(seed: int) -> None:
    level = 0.1
    dark = noisy(np.zeros((30, 30, 30), np.float32), level, np.random.default_rng(seed))
    assert dark.mean() == pytest.approx(level * np.sqrt(np.pi / 2), rel=0.03)
    bright = noisy(np.ones((30, 30, 30), np.float32), level, np.random.default_rng(seed))
    assert bright.std() == pytest.approx(level, rel=0.05)


def test_filling_goes_on_from_the_surface_and_keeps_what_is_inside() -> None:
    volumes, mask = np.stack([image(6), image(7)]), ball()
    volumes *= mask
    full = filled(volumes, mask)
    np.testing.assert_array_equal(full[:, mask], volumes[:, mask])
    assert (full > 0).all()
    assert not volumes[:, ~mask].any()  # which are left alone
    assert filled(volumes, np.zeros(SHAPE, np.bool_)) is volumes


@pytest.mark.parametrize("offset_mm", [-3, -1, 0, 1, 2])
def test_masks_grow_or_shrink_by_about_what_is_asked(offset_mm: float) -> None:
    points = np.stack(np.meshgrid(*(np.arange(48.0) - 23.5,) * 3, indexing="ij"))
    mask = np.linalg.norm(points, axis=0) < 18
    others = [another_mask(mask, offset_mm, (1, 1, 1), np.random.default_rng(seed)) for seed in range(8)]
    assert not any((other & ~mask).any() if offset_mm <= 0 else (mask & ~other).any() for other in others)
    radii = [np.cbrt(3 / (4 * np.pi) * other.sum()) for other in others]
    assert np.mean(radii) - 18 == pytest.approx(offset_mm, abs=0.1 + 0.35 * abs(offset_mm))
    assert bool(np.std(radii)) is bool(offset_mm)
