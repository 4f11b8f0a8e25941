"""From noise to clean coefficients: DDPM, DDIM and DPM-Solver++(2M), and shortcuts by their mean; and flows.

Every sampler takes `denoise(x, t)`, which returns the predicted clean x0 for x at integer timestep t of the
1000-step schedule, the starting noise (B, C, X, Y, Z) and a falling list of timesteps, and returns the final x.
`generator` is where its noise comes from: one for the whole batch or a sequence with one for each sample, each of which
then comes out as it would alone. `schedule` is the one that the network was trained with. To write another sampler,
write another such loop.

The samplers of a flow take its `velocity(x, t)`, where it starts, and rising thousandths of the way.
"""

import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cwdm.diffusion import PUBLISHED, TIMESTEPS, Schedule
from cwdm.wavelet import BANDS

Denoise = Callable[[Tensor, int], Tensor]
Sampler = Callable[..., Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None


def spaced_timesteps(steps: int) -> list[int]:
    """`steps` timesteps from 999 down to 0, evenly spaced (Nichol and Dhariwal, 2021); a single step is 999."""
    if not 1 <= steps <= TIMESTEPS:
        raise ValueError(f"steps must be 1 to {TIMESTEPS}, got {steps}")
    if steps == 1:
        return [TIMESTEPS - 1]
    return [round(i * (TIMESTEPS - 1) / (steps - 1)) for i in reversed(range(steps))]


def ddpm(
    denoise: Denoise,
    noise: Tensor,
    timesteps: Sequence[int],
    generator: Generators = None,
    schedule: Schedule = PUBLISHED,
) -> Tensor:
    """Ancestral sampling with the large variance β_t, over the full schedule or a shortened one.

    Ho et al. (2020), eq. 7 for the posterior mean; for a shortened schedule β is recomputed from the kept ᾱ
    (Nichol and Dhariwal, 2021, eq. 19). The last step returns its x0.
    """
    x = noise
    for t, alpha_bar, next_alpha_bar in _steps(timesteps, schedule):
        x0 = denoise(x, t)
        alpha = alpha_bar / next_alpha_bar
        beta = 1 - alpha
        mean = next_alpha_bar**0.5 * beta / (1 - alpha_bar) * x0
        mean += alpha**0.5 * (1 - next_alpha_bar) / (1 - alpha_bar) * x
        # Drawn at the last step too, as published, so that the stream of random numbers is the same.
        z = _randn_like(x, generator)
        x = mean.add_(z, alpha=beta**0.5) if next_alpha_bar < 1 else mean
    return x


def ddim(
    denoise: Denoise,
    noise: Tensor,
    timesteps: Sequence[int],
    generator: Generators = None,
    eta: float = 0.0,
    schedule: Schedule = PUBLISHED,
) -> Tensor:
    """DDIM (Song et al., 2021, eq. 12 and 16): deterministic for eta 0, ancestral with the small variance for eta 1."""
    x = noise
    for t, alpha_bar, next_alpha_bar in _steps(timesteps, schedule):
        x0 = denoise(x, t)
        eps = (x - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5
        sigma = eta * ((1 - next_alpha_bar) / (1 - alpha_bar) * (1 - alpha_bar / next_alpha_bar)) ** 0.5
        x = next_alpha_bar**0.5 * x0 + max(1 - next_alpha_bar - sigma**2, 0.0) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * _randn_like(x, generator)
    return x


def dpmpp(
    denoise: Denoise,
    noise: Tensor,
    timesteps: Sequence[int],
    generator: Generators = None,
    schedule: Schedule = PUBLISHED,
) -> Tensor:
    """DPM-Solver++(2M) in data prediction (Lu et al., 2022, algorithm 2); first order at the first and last step.

    Deterministic; `generator` is taken so that samplers are interchangeable, and left alone.
    """
    x = noise
    previous: tuple[Tensor, float] | None = None  # x0 of the step before, and its log signal-to-noise ratio step
    for t, alpha_bar, next_alpha_bar in _steps(timesteps, schedule):
        x0 = denoise(x, t)
        if next_alpha_bar == 1:
            return x0
        h = _half_log_snr(next_alpha_bar) - _half_log_snr(alpha_bar)
        estimate = x0
        if previous is not None:
            last_x0, last_h = previous
            estimate = x0 + h / (2 * last_h) * (x0 - last_x0)
        sigma_ratio = ((1 - next_alpha_bar) / (1 - alpha_bar)) ** 0.5
        x = sigma_ratio * x - next_alpha_bar**0.5 * math.expm1(-h) * estimate
        previous = x0, h
    return x


def posterior_mean(
    denoise: Denoise,
    noise: Tensor,
    timesteps: Sequence[int],
    generator: Generators = None,
    schedule: Schedule = PUBLISHED,
) -> Tensor:
    """E[x0]: what the network predicts at the noisiest timestep, where x_t tells next to nothing of x0.

    The mean over a pair of opposite noises, in which what is odd in the noise cancels (antithetic variates, Hammersley
    and Morton, 1956). Of `timesteps` the first alone counts.
    """
    t = falling_timesteps(timesteps)[0]
    return (denoise(noise, t) + denoise(-noise, t)) / 2


def texture(
    denoise: Denoise,
    noise: Tensor,
    timesteps: Sequence[int],
    generator: Generators = None,
    schedule: Schedule = PUBLISHED,
    bands: Sequence[str] = BANDS[1:],
) -> Tensor:
    """The mean with the texture of a sample: noised again to a timestep τ and denoised in a few steps.

    Chung et al., "Come-Closer-Diffuse-Faster", 2022: a start near the truth contracts to it, so that the noisier part
    of the way can be left out. What τ cannot bring back is lost: of normal data with standard deviation s,
    s √((1 − ᾱ_τ) / (1 − ᾱ_τ + ᾱ_τ s²)) is left.

    Args:
        timesteps: the mean's, then those of `dpmpp` from τ on.
        bands: taken from what was denoised, by their names in `cwdm.wavelet.BANDS`; the others are the mean's.
    """
    first, *rest = falling_timesteps(timesteps)
    mean = posterior_mean(denoise, noise, [first])
    if not rest:
        return mean
    alpha_bar = float(schedule.alpha_bars[rest[0]])
    x = alpha_bar**0.5 * mean + (1 - alpha_bar) ** 0.5 * _randn_like(mean, generator)
    drawn, chosen = dpmpp(denoise, x, rest, schedule=schedule), [BANDS.index(band) for band in bands]
    return mean.index_copy(1, torch.tensor(chosen, device=mean.device), drawn[:, chosen])


def euler(velocity: Denoise, source: Tensor, timesteps: Sequence[int], generator: Generators = None) -> Tensor:
    """Euler's method for a flow: straight on from each of the rising thousandths to the next."""
    x = source
    for t, following in pairwise((*timesteps, TIMESTEPS)):
        x = x + (following - t) / TIMESTEPS * velocity(x, t)
    return x


def heun(velocity: Denoise, source: Tensor, timesteps: Sequence[int], generator: Generators = None) -> Tensor:
    """Heun's second-order method for a flow: the mean of the velocities at both ends of a step, two evaluations."""
    x = source
    for t, following in pairwise((*timesteps, TIMESTEPS)):
        step, first = (following - t) / TIMESTEPS, velocity(x, t)
        x = x + step / 2 * (first + velocity(x + step * first, following))
    return x


SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim, "dpmpp": dpmpp}
SHORTCUTS: dict[str, Sampler] = {"mean": posterior_mean, "texture": texture}
FLOW_SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun}
OF_DIFFUSION = ChainMap(SHORTCUTS, SAMPLERS)  # iterated from the last on
"""What samples from weights that were trained by diffusion; what is added to SAMPLERS, too."""


def known_sampler(name: str) -> str:
    """The name itself; raises ValueError if no sampler has it."""
    if name not in OF_DIFFUSION | FLOW_SAMPLERS:
        raise ValueError(f"must be one of {', '.join(OF_DIFFUSION | FLOW_SAMPLERS)}")
    return name


def planned_timesteps(name: str, steps: int, tau: int) -> list[int]:
    """What a sampler is given as timesteps, falling.

    Args:
        steps: of the sampler; of `texture`, those that denoise; `mean` has none.
        tau: timestep that `texture` noises to.
    """
    if name == "mean":
        return [TIMESTEPS - 1]
    if name == "texture":
        # Quadratic, as the signal-to-noise ratio changes fastest at the end (Song et al., 2021, appendix D.2).
        falling = [round(tau * (i / (steps - 1)) ** 2) for i in reversed(range(steps))] if steps > 1 else [tau]
        return [TIMESTEPS - 1, *dict.fromkeys(falling)]
    return spaced_timesteps(steps)


def flow_timesteps(steps: int) -> list[int]:
    """What a sampler of a flow is given as timesteps, rising thousandths of the way."""
    return [round(i * TIMESTEPS / steps) for i in range(steps)]


def evaluations(sampler: Sampler, timesteps: Sequence[int]) -> int:
    """How often a sampler asks the network."""
    if sampler is heun:
        return 2 * len(timesteps)
    return len(timesteps) + (getattr(sampler, "func", sampler) in SHORTCUTS.values())


def falling_timesteps(timesteps: Sequence[int]) -> list[int]:
    """The timesteps as whole numbers; raises ValueError if they are none, do not fall, or leave the schedule."""
    whole = [int(t) for t in timesteps]
    if not whole or any(a <= b for a, b in pairwise(whole)) or whole[0] >= TIMESTEPS or whole[-1] < 0:
        raise ValueError(f"must be a falling list of whole numbers within {TIMESTEPS - 1} to 0, such as [3, 2, 1, 0]")
    return whole


def _steps(timesteps: Sequence[int], schedule: Schedule) -> Iterator[tuple[int, float, float]]:
    """(t, ᾱ_t, ᾱ of the next timestep), the last ᾱ being 1: no noise left."""
    timesteps = falling_timesteps(timesteps)
    alpha_bars = [float(schedule.alpha_bars[t]) for t in timesteps] + [1.0]
    yield from zip(timesteps, alpha_bars, alpha_bars[1:], strict=False)


def _half_log_snr(alpha_bar: float) -> float:
    """λ = log(α/σ) = ½ log(ᾱ / (1 − ᾱ))."""
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def _randn_like(x: Tensor, generator: Generators) -> Tensor:
    return normal_noise(x.shape, generator, x.device, x.dtype)


def normal_noise(
    shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normal noise (B, …), drawn where the generator is and then moved: a CPU's generator is the same for any device.

    Of a sequence of generators each draws its sample as if that were alone.
    """
    if not isinstance(generator, Sequence):
        drawn_on = generator.device if generator is not None else device
        return torch.randn(shape, generator=generator, device=drawn_on, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}; give one a sample, or one for all")
    return torch.cat([normal_noise((1, *shape[1:]), one, device, dtype) for one in generator])
