import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from cwdm.metrics import psnr, ssim


def volumes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.RandomState(0)
    truth = gaussian_filter(random.random_sample((20, 24, 18)), 1).astype(np.float32)
    prediction = np.clip(truth + 0.05 * random.standard_normal(truth.shape), 0, 1).astype(np.float32)
    mask = np.zeros(truth.shape, bool)
    mask[4:15, 5:20, 3:14] = True
    return prediction, truth, mask


def test_psnr_by_hand() -> None:
    truth = np.zeros((2, 2, 2), np.float32)
    prediction = np.full((2, 2, 2), 0.1, np.float32)
    prediction[0] = 0.9
    mask = np.zeros((2, 2, 2), bool)
    mask[1] = True
    assert psnr(prediction, truth, mask) == pytest.approx(20.0, abs=1e-5)
    assert psnr(truth, truth, mask) == float("inf")


def test_ssim_against_its_formula() -> None:
    prediction, truth, mask = volumes()

    def smooth(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image.astype(np.float64), 1.5, truncate=3.5)

    x, y = prediction.astype(np.float64), truth.astype(np.float64)
    mean_x, mean_y = smooth(x), smooth(y)
    variance_x, variance_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast = (2 * covariance + c2) / (variance_x + variance_y + c2)
    assert ssim(prediction, truth, mask) == pytest.approx((luminance * contrast)[mask].mean(), abs=1e-6)


def test_ssim_of_equal_volumes_is_one_and_of_noise_less() -> None:
    prediction, truth, mask = volumes()
    assert ssim(truth, truth, mask) == pytest.approx(1.0)
    assert ssim(prediction, truth, mask) < 1.0


@pytest.mark.parametrize("figure", [psnr, ssim])
def test_empty_mask_is_refused(figure) -> None:
    prediction, truth, mask = volumes()
    with pytest.raises(ValueError, match="empty"):
        figure(prediction, truth, np.zeros_like(mask))
