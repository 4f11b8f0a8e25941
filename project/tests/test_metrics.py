"""Figures of merit against scikit-image, MONAI and their formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.metrics import SSIMMetric
from scipy.ndimage import gaussian_filter
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from cwdm.metrics import brasyn_ssim, brasyn_unit, interior, mae, mse, psnr, ssim, value_range

SHAPE = (20, 24, 18)


def volumes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.RandomState(0)
    truth = gaussian_filter(random.random_sample(SHAPE), 1).astype(np.float32)
    prediction = np.clip(truth + 0.05 * random.standard_normal(truth.shape), 0, 1).astype(np.float32)
    mask = np.zeros(truth.shape, bool)
    mask[4:15, 5:20, 3:14] = True
    return prediction, truth, mask


def brains(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two different volumes of scanner-like intensities in a wide field of zeros."""
    random = np.random.RandomState(seed)
    truth, prediction = np.zeros((2, 40, 36, 32), np.float32)
    truth[13:25, 12:22, 11:19] = 300 + 100 * gaussian_filter(random.standard_normal((12, 10, 8)), 1)
    prediction[14:26, 12:22, 11:18] = 310 + 100 * gaussian_filter(random.standard_normal((12, 10, 7)), 1)
    return prediction, truth


def scikit_image(prediction: np.ndarray, truth: np.ndarray, data_range: float) -> tuple[float, np.ndarray]:
    return structural_similarity(
        prediction.astype(np.float64),
        truth.astype(np.float64),
        data_range=data_range,
        gaussian_weights=True,
        use_sample_covariance=False,
        full=True,
    )


def test_psnr_by_hand() -> None:
    truth = np.zeros((2, 2, 2), np.float32)
    prediction = np.full((2, 2, 2), 0.1, np.float32)
    prediction[0] = 0.9
    mask = np.zeros((2, 2, 2), bool)
    mask[1] = True
    assert psnr(prediction, truth, mask) == pytest.approx(20.0, abs=1e-5)
    assert psnr(truth, truth, mask) == float("inf")


def test_errors_against_scikit_image() -> None:
    prediction, truth, _ = volumes()
    everywhere = np.ones(SHAPE, bool)
    a, b = truth.astype(np.float64), prediction.astype(np.float64)
    assert mse(prediction, truth, everywhere) == pytest.approx(mean_squared_error(a, b), abs=1e-12)
    assert mae(prediction, truth, everywhere) == pytest.approx(np.abs(a - b).mean(), abs=1e-12)
    assert psnr(prediction, truth, everywhere) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-9)


def test_ssim_against_its_formula() -> None:
    prediction, truth, mask = volumes()

    def smooth(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image.astype(np.float64), 1.5, truncate=3.5, mode="mirror")

    x, y = prediction.astype(np.float64), truth.astype(np.float64)
    mean_x, mean_y = smooth(x), smooth(y)
    variance_x, variance_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast = (2 * covariance + c2) / (variance_x + variance_y + c2)
    for region in (mask, np.ones(SHAPE, bool)):
        assert ssim(prediction, truth, region) == pytest.approx((luminance * contrast)[region].mean(), abs=1e-9)


def test_ssim_against_scikit_image_and_monai() -> None:
    prediction, truth, mask = volumes()
    mean, values = scikit_image(prediction, truth, 1.0)
    assert ssim(prediction, truth, interior(SHAPE)) == pytest.approx(mean, abs=1e-9)
    inner = mask & interior(SHAPE)
    assert ssim(prediction, truth, inner) == pytest.approx(values[inner].mean(), abs=1e-9)
    monai = SSIMMetric(3)(torch.from_numpy(prediction)[None, None], torch.from_numpy(truth)[None, None])
    assert ssim(prediction, truth, interior(SHAPE)) == pytest.approx(monai.item(), abs=1e-4)


@pytest.mark.parametrize("data_range", [400.0, 1000.0])
def test_ssim_of_brains_in_air_is_that_of_the_whole_volume(data_range: float) -> None:
    prediction, truth = brains()
    mean, values = scikit_image(prediction, truth, data_range)
    assert ssim(prediction, truth, interior(truth.shape), data_range) == pytest.approx(mean, abs=1e-9)
    for mask in (truth > 0, truth == 0, prediction == 0, np.ones(truth.shape, bool)):
        assert ssim(prediction, truth, mask, data_range) == pytest.approx(values[mask].mean(), abs=1e-9)


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_ssim_is_symmetric_and_keeps_when_both_volumes_and_the_range_are_scaled(seed: int, factor: float) -> None:
    prediction, truth = brains(seed)
    mask = interior(truth.shape)
    value = ssim(prediction, truth, mask, 500)
    assert -1 <= value <= 1
    assert ssim(truth, prediction, mask, 500) == pytest.approx(value, abs=1e-12)
    scaled = (volume * np.float32(factor) for volume in (prediction, truth))
    assert ssim(*scaled, mask, 500 * float(np.float32(factor))) == pytest.approx(value, abs=1e-5)


def test_ssim_of_equal_volumes_is_one_and_of_noise_less() -> None:
    prediction, truth, mask = volumes()
    assert ssim(truth, truth, mask) == pytest.approx(1.0)
    assert ssim(prediction, truth, mask) < 1.0
    nothing = np.zeros_like(truth)
    assert ssim(nothing, nothing, mask) == 1.0


def test_brasyn_scaling_by_hand() -> None:
    volume = np.arange(-100, 901, dtype=np.float32).reshape(7, 11, 13)  # percentiles 0.5 and 99.5: -95 and 895
    assert np.allclose(brasyn_unit(volume), np.clip(volume, 0, 895) / 895, atol=1e-6)
    assert np.allclose(brasyn_unit(volume + 200), (np.clip(volume, -95, 895) + 95) / 990, atol=1e-6)


def test_brasyn_ssim_of_regions() -> None:
    prediction, truth = (brasyn_unit(volume) for volume in brains())
    tumour = np.zeros(truth.shape, bool)
    tumour[15:20, 14:18, 12:16] = True
    for mask in (tumour, ~tumour):
        cut = prediction * mask, truth * mask
        _, values = scikit_image(*cut, data_range=max(np.ptp(cut[0]), np.ptp(cut[1])))
        assert brasyn_ssim(prediction, truth, mask) == pytest.approx(values[mask].mean(), abs=1e-6)


def test_the_range_of_a_pair_is_the_wider_one() -> None:
    prediction, truth = brains()
    assert value_range((prediction, truth * 3)) == pytest.approx(float(3 * truth.max()))


@pytest.mark.parametrize("metric", [psnr, ssim, mse, mae, brasyn_ssim])
def test_empty_mask_is_refused(metric) -> None:
    prediction, truth, mask = volumes()
    with pytest.raises(ValueError, match="empty"):
        metric(prediction, truth, np.zeros_like(mask))


def test_what_cannot_be_scaled_is_refused() -> None:
    prediction, truth, mask = volumes()
    with pytest.raises(ValueError, match="nothing to scale"):
        brasyn_unit(np.full(SHAPE, -3, np.float32))
    with pytest.raises(ValueError, match="positive number, found 0"):
        ssim(prediction, truth, mask, 0)
    with pytest.raises(ValueError, match="positive number"):
        brasyn_ssim(np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.float32), mask)
    with pytest.raises(ValueError, match="at least 11 voxels"):
        interior((240, 240, 10))
