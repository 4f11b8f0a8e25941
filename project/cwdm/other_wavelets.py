"""Orthogonal wavelets other than Haar, by ptwt's boundary-corrected transform of one level."""

from functools import lru_cache

import ptwt
import torch
from torch import Tensor

_PTWT_BANDS = ("aad", "ada", "add", "daa", "dad", "dda", "ddd")


def bands(x: Tensor, wavelet: str) -> list[Tensor]:
    """The eight orthonormal bands of (B, C, X, Y, Z), each (B, C, X/2, Y/2, Z/2), LLL first."""
    lll, high = _transforms(wavelet, x.device, x.dtype)[0](x.flatten(0, 1))
    return [band.unflatten(0, x.shape[:2]) for band in (lll, *(high[name] for name in _PTWT_BANDS))]


def volume(bands: list[Tensor], wavelet: str) -> Tensor:
    """(B, C, X, Y, Z) from its eight orthonormal bands (B, C, X/2, Y/2, Z/2)."""
    lll, *high = [band.flatten(0, 1) for band in bands]
    transform = _transforms(wavelet, lll.device, lll.dtype)[1]
    made: Tensor = transform((lll, dict(zip(_PTWT_BANDS, high, strict=True))))
    return made.unflatten(0, bands[0].shape[:2])


@lru_cache(maxsize=8)
def _transforms(
    wavelet: str, device: torch.device, dtype: torch.dtype
) -> tuple[ptwt.MatrixWavedec3, ptwt.MatrixWaverec3]:
    """They keep the matrices of the last shape they saw, whatever the next volume's device and dtype."""
    return ptwt.MatrixWavedec3(wavelet, level=1), ptwt.MatrixWaverec3(wavelet)
