"""The diffusion process: noise schedule, forward noising and the training loss."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from cwdm.wavelet import dwt

TIMESTEPS = 1000


@cache
def alpha_bars() -> Tensor:
    """ᾱ_t of the linear schedule, betas 1e-4 to 0.02 (Ho et al., 2020): (1000,) float64 on the CPU."""
    betas = torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0)


@cache
def alpha_bars_on(device: torch.device) -> Tensor:
    """`alpha_bars` in float32 on a device: (1000,)."""
    return alpha_bars().float().to(device)


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = √ᾱ_t x0 + √(1−ᾱ_t) noise (Ho et al., 2020, eq. 4).

    Args:
        x0, noise: (B, C, X, Y, Z).
        t: (B,) integer timesteps.
    """
    alpha_bar = alpha_bars()[t.cpu()].to(x0.device)[:, None, None, None, None]
    return alpha_bar.sqrt().to(x0.dtype) * x0 + (1 - alpha_bar).sqrt().to(x0.dtype) * noise


def subband_losses(
    model: Callable[[Tensor, Tensor], Tensor],
    volume: Tensor,
    conditions: Tensor | None,
    t: Tensor,
    noise: Tensor,
    wavelet: str = "haar",
) -> Tensor:
    """Squared error of the predicted coefficients, a mean for each subband; their mean is the training loss.

    The noise is drawn in image space and transformed without the division of LLL by 3, as published.

    Args:
        model: `model(x, t)`, x (B, 8 + 8 N, X/2, Y/2, Z/2).
        volume: target (B, 1, X, Y, Z).
        conditions: (B, N, X, Y, Z), or None for an unconditional model.
        t: (B,) integer timesteps.
        noise: standard normal (B, 1, X, Y, Z).

    Returns:
        (B, 8), bands in the order of `cwdm.wavelet`.
    """
    x0 = dwt(volume, wavelet)
    x_t = add_noise(x0, dwt(noise, wavelet, lll_divisor=1.0), t)
    if conditions is not None:
        x_t = torch.cat((x_t, dwt(conditions, wavelet)), dim=1)
    return (model(x_t, t).float() - x0).square().mean(dim=(2, 3, 4))
