"""What a step minimises: for each objective, losses of the eight subbands."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cwdm.diffusion import SCHEDULES, subband_losses
from cwdm.flow import flow_losses
from cwdm.onepass import Prediction, unit
from cwdm.training.settings import Errors, TrainingSettings
from cwdm.wavelet import LLL_DIVISOR, dwt, idwt

SSIM_EDGE = 7
"""Edge in voxels of the windows that `structure_loss` compares."""


def losses(network: nn.Module, given: dict[str, Tensor], settings: TrainingSettings) -> Tensor:
    """Losses (B, 8) of the subbands.

    Args:
        given: what `assemble` makes of a batch.
    """
    loss, targets = settings.loss, (given["target"],) if settings.unet().targets else ()
    if loss.objective == "one-pass":
        volume, conditions, shown, target = (given[name] for name in ("volume", "conditions", "given", "target"))
        how = (loss.errors, loss.beta, loss.structure, loss.brightness)
        return one_pass_losses(network, volume, conditions, shown, target, *how)
    volume, conditions, t, noise = (given[name] for name in ("volume", "conditions", "t", "noise"))
    wavelet = settings.network.wavelet
    if loss.objective == "flow":
        return flow_losses(lambda x, t: network(x, t, *targets), volume, conditions, t, noise, wavelet)
    return subband_losses(
        lambda x, t: network(x, t, *targets),
        volume,
        conditions if conditions.shape[1] else None,
        t,
        noise,
        wavelet,
        SCHEDULES[loss.schedule],
    )


def total(settings: TrainingSettings, bands: Tensor) -> Tensor:
    """The loss of (B, 8) subband losses."""
    if settings.loss.over == "coefficients" or settings.loss.objective == "one-pass":
        return bands.mean()
    return bands[:, 0].mean() * LLL_DIVISOR**2 / 8 + bands[:, 1:].mean() * 7 / 8


def one_pass_losses(
    model: Callable[[Tensor, Tensor, Tensor], Prediction],
    volume: Tensor,
    conditions: Tensor,
    given: Tensor,
    target: Tensor,
    errors: Errors = "gaussian",
    beta: float = 0.5,
    structure: float = 0.0,
    brightness: float = 1.0,
) -> Tensor:
    """Negative log-likelihoods of the coefficients inside the brain, a sum for each subband; their mean is the loss.

    β-NLL (Seitzer et al., "On the Pitfalls of Heteroscedastic Uncertainty Estimation with Probabilistic Neural
    Networks", 2022): each coefficient's likelihood counts as much as its variance to the power of β, so that what is
    hard to predict is not given up; the best variance stays the mean squared error. Coefficients are those of the
    orthonormal transform, in which squared errors are a voxel's, over the root mean square of the prior's standard
    deviations, so that targets and sets of conditions count alike.

    Background, where all conditions are 0, counts nothing, in voxels at the edge of the brain neither. Divided is by
    all voxels, so that a part of an image counts as much as there is brain in it.

    Args:
        model: as `OnePassUNet`.
        volume: target (B, 1, X, Y, Z).
        conditions: (B, N, X, Y, Z), 0 where they are not given.
        given: (B, N) bool.
        target: (B,).
        errors: distributed as `gaussian` or, less moved by outliers, `laplace`.
        beta: of β-NLL, 0 to 1: 0 is the likelihood, 1 gives means the gradient of squared (or absolute) errors.
        structure: weight of `structure_loss`.
        brightness: share of a sample's mean error that is left in its errors.

    Returns:
        (B, 8), bands in the order of `cwdm.wavelet`.
    """
    coefficients = dwt(conditions)
    found = model(coefficients, given, target)
    inside = coefficients.any(1, keepdim=True)
    volume = volume * (conditions != 0).any(1, keepdim=True)
    truth = dwt(volume)
    error = (found.mean - truth) / found.deviation
    if brightness < 1:
        mean = (error[:, :1] * inside).sum((2, 3, 4), keepdim=True) / inside.sum((2, 3, 4), keepdim=True).clamp(min=1)
        error = torch.cat((error[:, :1] - (1 - brightness) * mean, error[:, 1:]), dim=1)
    scale = unit(torch.tensor([[LLL_DIVISOR] + 7 * [1.0]], device=volume.device)) * found.deviation
    scale = scale / scale.square().mean(1, keepdim=True).sqrt()
    log_ratio = found.log_ratio
    if errors == "gaussian":
        likelihood = (log_ratio + error.square() * torch.exp(-log_ratio)) / 2
    else:
        likelihood = log_ratio / 2 + 2**0.5 * error.abs() * torch.exp(-log_ratio / 2)
    power = beta if errors == "gaussian" else beta / 2
    weight = (scale.square() * log_ratio.detach().exp()) ** power
    losses = (weight * likelihood * inside).mean(dim=(2, 3, 4))
    if structure:
        losses = losses + structure * structure_loss(idwt(found.mean), volume, inside)[:, None]
    return losses


def structure_loss(image: Tensor, truth: Tensor, inside: Tensor) -> Tensor:
    """1 − SSIM of volumes in [0, 1] in the brain, by even windows: (B,).

    Args:
        image, truth: (B, 1, X, Y, Z).
        inside: where each voxel's block is in the brain, (B, 1, X/2, Y/2, Z/2) bool.
    """

    def blurred(x: Tensor) -> Tensor:
        for axis in (2, 3, 4):  # products of matrices: pooling takes twenty times as long
            place = torch.arange(x.shape[axis], device=x.device)
            window = (place[:, None] - place).abs() <= SSIM_EDGE // 2
            x = (x.transpose(axis, -1) @ window.to(x.dtype).div(SSIM_EDGE)).transpose(axis, -1)
        return x

    a, b = blurred(image), blurred(truth)
    variances = blurred(image.square() + truth.square()) - a.square() - b.square()
    covariance = blurred(image * truth) - a * b
    ssim = (2 * a * b + 0.01**2) * (2 * covariance + 0.03**2)
    ssim = ssim / ((a.square() + b.square() + 0.01**2) * (variances + 0.03**2))
    return ((1 - ssim) * F.interpolate(inside.float(), scale_factor=2.0)).mean(dim=(1, 2, 3, 4))
