"""The diffusion process: noise schedules, forward noising and the training loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from cwdm.wavelet import dwt

TIMESTEPS = 1000


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise schedule: how much is left of the clean coefficients at each timestep.

    Attributes:
        name: as a checkpoint's record states it.
        alpha_bars: ᾱ_t, falling, (1000,) float64 on the CPU.
    """

    name: str
    alpha_bars: Tensor


def linear_schedule() -> Schedule:
    """Betas rise evenly from 1e-4 to 0.02 (Ho et al., 2020), as published."""
    # On the CPU also where a network without memory for its weights is the first to ask for a schedule.
    betas = torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64, device="cpu")
    return Schedule("linear", torch.cumprod(1 - betas, dim=0))


def cosine_schedule() -> Schedule:
    """ᾱ falls as a squared cosine, betas at most 0.999 (Nichol and Dhariwal, 2021, eq. 17, s = 0.008)."""
    times = torch.linspace(0, 1, TIMESTEPS + 1, dtype=torch.float64, device="cpu")
    curve = ((times + 0.008) / 1.008 * math.pi / 2).cos().square()
    betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return Schedule("cosine", torch.cumprod(1 - betas, dim=0))


PUBLISHED = linear_schedule()
SCHEDULES = {schedule.name: schedule for schedule in (PUBLISHED, cosine_schedule())}


def known_schedule(name: str) -> str:
    """The name itself; raises ValueError if no schedule has it."""
    if name not in SCHEDULES:
        raise ValueError(f"must be one of {', '.join(SCHEDULES)}")
    return name


@cache
def alpha_bars_on(device: torch.device, schedule: Schedule = PUBLISHED) -> Tensor:
    """ᾱ_t of a schedule in float32 on a device: (1000,)."""
    return schedule.alpha_bars.float().to(device)


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, schedule: Schedule = PUBLISHED) -> Tensor:
    """x_t = √ᾱ_t x0 + √(1−ᾱ_t) noise (Ho et al., 2020, eq. 4).

    Args:
        x0, noise: (B, C, X, Y, Z).
        t: (B,) integer timesteps.
    """
    alpha_bar = schedule.alpha_bars[t.cpu()].to(x0.device)[:, None, None, None, None]
    return alpha_bar.sqrt().to(x0.dtype) * x0 + (1 - alpha_bar).sqrt().to(x0.dtype) * noise


def subband_losses(
    model: Callable[[Tensor, Tensor], Tensor],
    volume: Tensor,
    conditions: Tensor | None,
    t: Tensor,
    noise: Tensor,
    wavelet: str = "haar",
    schedule: Schedule = PUBLISHED,
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
    x_t = add_noise(x0, dwt(noise, wavelet, lll_divisor=1.0), t, schedule)
    if conditions is not None:
        x_t = torch.cat((x_t, dwt(conditions, wavelet)), dim=1)
    return (model(x_t, t).float() - x0).square().mean(dim=(2, 3, 4))
