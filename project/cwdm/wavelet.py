"""3D wavelet transform of volumes, one level, and its inverse.

A volume becomes eight subbands of half its size, ordered LLL LLH LHL LHH HLL HLH HHL HHH (low or high pass
along the first, second and third spatial axis). LLL is a smoothed copy whose values are 8**0.5 times those of
the volume; WDM divides it by 3 so that the network sees bands of similar range (Friedrich et al., "WDM: 3D
Wavelet Diffusion Models for High-Resolution Medical Image Synthesis", 2024). That 3 is known to this file
alone.

Haar is sums and differences of neighbours and needs no filter bank; every other orthogonal wavelet goes through
ptwt's boundary-corrected transform, which keeps the halved size and is as invertible.
"""

from functools import lru_cache

import ptwt
import torch
from torch import Tensor

BANDS = ("LLL", "LLH", "LHL", "LHH", "HLL", "HLH", "HHL", "HHH")
LLL_DIVISOR = 3.0
_HAAR_GAIN = 8**-0.5  # 1/sqrt(2) an axis
_PTWT_BANDS = ("aad", "ada", "add", "daa", "dad", "dda", "ddd")


def dwt(x: Tensor, wavelet: str = "haar", lll_divisor: float = LLL_DIVISOR) -> Tensor:
    """Wavelet coefficients of volumes, LLL divided by 3.

    Args:
        x: volumes (B, C, X, Y, Z), spatial sizes even.
        wavelet: "haar" or the name of another orthogonal wavelet of PyWavelets.
        lll_divisor: 1 for the plain transform, as the training noise needs it.

    Returns:
        (B, 8 C, X/2, Y/2, Z/2): the eight bands of the first channel, then those of the second, …

    Raises:
        ValueError: a spatial size is odd, or the wavelet is unknown.
    """
    _check_even(x)
    lll, *high = haar(x) if wavelet == "haar" else _ptwt_bands(x, wavelet)
    return torch.stack([lll / lll_divisor, *high], dim=2).flatten(1, 2)


def idwt(coefficients: Tensor, wavelet: str = "haar", lll_divisor: float = LLL_DIVISOR) -> Tensor:
    """Volumes of wavelet coefficients, the inverse of `dwt`.

    Args:
        coefficients: (B, 8 C, X/2, Y/2, Z/2), LLL divided by `lll_divisor`.

    Returns:
        (B, C, X, Y, Z).
    """
    if coefficients.ndim != 5 or coefficients.shape[1] % 8:
        raise ValueError(f"expected (B, 8 C, X, Y, Z) coefficients, got {tuple(coefficients.shape)}")
    lll, *high = coefficients.unflatten(1, (-1, 8)).unbind(2)
    bands = [lll * lll_divisor, *high]
    return inverse_haar(bands) if wavelet == "haar" else _ptwt_inverse(bands, wavelet)


def haar(x: Tensor) -> list[Tensor]:
    """The eight orthonormal Haar bands of (..., X, Y, Z), each (..., X/2, Y/2, Z/2), LLL first.

    low = (even + odd) / sqrt(2), high = (even - odd) / sqrt(2) along each axis.
    """
    bands = [x * _HAAR_GAIN]
    for axis in (-3, -2, -1):
        pairs = [band.unflatten(axis, (-1, 2)).unbind(axis) for band in bands]
        bands = [band for even, odd in pairs for band in (even + odd, even - odd)]
    return bands


def inverse_haar(bands: list[Tensor]) -> Tensor:
    """(..., X, Y, Z) from its eight orthonormal Haar bands (..., X/2, Y/2, Z/2)."""
    for axis in (-1, -2, -3):
        pairs = zip(bands[::2], bands[1::2], strict=True)
        bands = [torch.stack((low + high, low - high), axis).flatten(axis - 1, axis) for low, high in pairs]
    return bands[0] * _HAAR_GAIN


def _check_even(x: Tensor) -> None:
    if x.ndim != 5 or any(size % 2 for size in x.shape[2:]):
        raise ValueError(f"expected (B, C, X, Y, Z) volumes of even size, got {tuple(x.shape)}")


@lru_cache(maxsize=8)
def _ptwt_transforms(
    wavelet: str, device: torch.device, dtype: torch.dtype
) -> tuple[ptwt.MatrixWavedec3, ptwt.MatrixWaverec3]:
    """They keep the matrices of the last shape they saw, whatever the next volume's device and dtype."""
    return ptwt.MatrixWavedec3(wavelet, level=1), ptwt.MatrixWaverec3(wavelet)


def _ptwt_bands(x: Tensor, wavelet: str) -> list[Tensor]:
    lll, high = _ptwt_transforms(wavelet, x.device, x.dtype)[0](x.flatten(0, 1))
    return [band.unflatten(0, x.shape[:2]) for band in (lll, *(high[name] for name in _PTWT_BANDS))]


def _ptwt_inverse(bands: list[Tensor], wavelet: str) -> Tensor:
    lll, *high = [band.flatten(0, 1) for band in bands]
    transform = _ptwt_transforms(wavelet, lll.device, lll.dtype)[1]
    volume: Tensor = transform((lll, dict(zip(_PTWT_BANDS, high, strict=True))))
    return volume.unflatten(0, bands[0].shape[:2])
