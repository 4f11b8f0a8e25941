"""Flow matching from the images that are given to the one that is missing, in a step or two.

Tur et al., "WFM: 3D Wavelet Flow Matching for Ultrafast Multi-Modal MRI Synthesis", MIDL 2026: what is given shares its
anatomy with what is missing, so that a path from the mean of the given images' coefficients, x_s, is shorter and
straighter than one from noise. At time t of 0 to 1 it is at x_t = (1 − t) x_s + t x_1, x_1 being the target, and in
training ½ √(t (1 − t)) ε beside it; the network learns the velocity x_1 − x_s.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cwdm.wavelet import dwt

NOISE = 0.5
"""Standard deviation of what is added in training, in units of √(t (1 − t))."""


def source(conditions: Tensor) -> Tensor:
    """Where the path starts: the mean of the images that are given, those that are not 0 everywhere.

    Args:
        conditions: coefficients (B, 8 N, X, Y, Z).

    Returns:
        (B, 8, X, Y, Z).
    """
    images = conditions.unflatten(1, (-1, 8))
    given = images.flatten(2).any(2).sum(1).clamp(min=1)
    mean: Tensor = images.sum(1) / given[:, None, None, None, None]
    return mean


def flow_losses(
    model: Callable[[Tensor, Tensor], Tensor],
    volume: Tensor,
    conditions: Tensor,
    t: Tensor,
    noise: Tensor,
    wavelet: str = "haar",
) -> Tensor:
    """Squared error of the predicted velocity, a mean for each subband; their mean is the training loss.

    Args:
        model: `model(x, t)`, x (B, 8 + 8 N, X/2, Y/2, Z/2), the conditions behind x_t.
        volume: target (B, 1, X, Y, Z).
        conditions: (B, N, X, Y, Z), 0 where they are not given.
        t: (B,) thousandths of the way, 0 to 1000.
        noise: standard normal (B, 1, X, Y, Z).

    Returns:
        (B, 8), bands in the order of `cwdm.wavelet`.
    """
    given, x_1 = dwt(conditions, wavelet), dwt(volume, wavelet)
    x_s = source(given)
    time = (t.to(x_1.dtype) / 1000)[:, None, None, None, None]
    x_t = torch.lerp(x_s, x_1, time) + NOISE * (time * (1 - time)).sqrt() * dwt(noise, wavelet, lll_divisor=1.0)
    velocity = model(torch.cat((x_t, given), dim=1), t).float()
    return (velocity - (x_1 - x_s)).square().mean(dim=(2, 3, 4))
