"""3D wavelet transform of volumes, one level, and its inverse.

A volume becomes eight subbands of half its size, ordered LLL LLH LHL LHH HLL HLH HHL HHH (low or high pass
along the first, second and third spatial axis). LLL is a smoothed copy whose values are 8**0.5 times those of
the volume; WDM divides it by 3 so that the network sees bands of similar range (Friedrich et al., "WDM: 3D
Wavelet Diffusion Models for High-Resolution Medical Image Synthesis", 2024). That 3 is known to this file
alone.

Haar is sums and differences of neighbours and needs no filter bank; every other orthogonal wavelet goes through
ptwt's boundary-corrected transform, which keeps the halved size and is as invertible.
"""

from types import ModuleType

import torch
from torch import Tensor

BANDS = ("LLL", "LLH", "LHL", "LHH", "HLL", "HLH", "HHL", "HHH")
LLL_DIVISOR = 3.0
_HAAR_GAIN = 8**-0.5  # 1/sqrt(2) an axis


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
    lll, *high = haar(x) if wavelet == "haar" else _others().bands(x, wavelet)
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
    return inverse_haar(bands) if wavelet == "haar" else _others().volume(bands, wavelet)


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


def _others() -> ModuleType:
    """The other wavelets; loaded only where one is asked for, as their library takes half a second."""
    from cwdm import other_wavelets

    return other_wavelets


def _check_even(x: Tensor) -> None:
    if x.ndim != 5 or any(size % 2 for size in x.shape[2:]):
        raise ValueError(f"expected (B, C, X, Y, Z) volumes of even size, got {tuple(x.shape)}")
