"""The linear-Gaussian prior of a network that learns what a regression on the conditions does not know."""

import torch
from torch import Tensor, nn

from cwdm.diffusion import PUBLISHED, Schedule, alpha_bars_on


class Regression(nn.Module):
    """A linear Gaussian model of each voxel's clean coefficients given its conditions; a network learns the rest.

    Given the conditions c, a voxel's clean coefficients are normal, with the mean W c + b (or 0 where all conditions
    are 0) and a standard deviation for each band. Bayes' rule gives their mean and standard deviation given the noisy
    coefficients too: the prior's among pure noise, the coefficients themselves at the end. The network behind it is
    given the innovation, which is what the noisy coefficients add to the prior's mean, in units of the prior's standard
    deviation, and the conditions in units of their root mean square; it answers in units of the standard deviation that
    is left (after the preconditioning of Karras et al., 2022). In a new one, W c is the mean of the conditions, and all
    standard deviations and root mean squares are 1; training leaves all of it as it is, once it is fitted.

    Args:
        out: coefficients of a voxel, one for each band.
        given: coefficients of its conditions.
        targets: kinds of volume, each with a model of its own.
        schedule: of the noise; None for the published one.
    """

    def __init__(self, out: int, given: int, targets: int, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.schedule = schedule or PUBLISHED
        mean = torch.zeros(targets, out, given)
        for band in range(out):  # not torch.eye, which on the meta device loads PyTorch's compiler
            mean[:, band, band::out] = out / given
        self.weight = nn.Parameter(mean, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(targets, out), requires_grad=False)
        self.deviation = nn.Parameter(torch.ones(targets, out), requires_grad=False)
        # The conditions' root mean square, under its name in files of weights.
        self.magnitude = nn.Parameter(torch.ones(given), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The network's input, and the mean and standard deviation of the clean coefficients.

        Args:
            x: noisy coefficients and conditions (B, out + given, X, Y, Z).
            t: (B,) integer timesteps.
            target: (B,) the targets' numbers; None where there is one kind.

        Returns:
            (B, out + given, X, Y, Z), (B, out, X, Y, Z), (B, out, 1, 1, 1).
        """
        out = self.bias.shape[1]
        noisy, conditions = x[:, :out], x[:, out:]
        number = torch.zeros_like(t) if target is None else target
        weight, bias = self.weight[number], self.bias[number]
        expected = linear(weight, bias, conditions)
        prior = self.deviation[number][..., None, None, None].float()
        alpha_bar = alpha_bars_on(t.device, self.schedule)[t][:, None, None, None, None]
        total = alpha_bar * prior**2 + 1 - alpha_bar
        gain = (alpha_bar.sqrt() * prior / total).to(x.dtype)  # of the noisy coefficients, in units of `prior`
        innovation = gain * (noisy - alpha_bar.sqrt().to(x.dtype) * expected)
        network_input = torch.cat((innovation, conditions / self.magnitude[:, None, None, None]), dim=1)
        left = (prior * ((1 - alpha_bar) / total).sqrt()).to(x.dtype)
        return network_input, expected + prior.to(x.dtype) * innovation, left


def linear(weight: Tensor, bias: Tensor, conditions: Tensor) -> Tensor:
    """W c + b of every voxel, or 0 where all its conditions are 0: (B, out, X, Y, Z).

    Args:
        weight: (B, out, given).
        bias: (B, out).
        conditions: (B, given, X, Y, Z).
    """
    expected = torch.baddbmm(bias[..., None], weight, conditions.flatten(2)).unflatten(2, conditions.shape[2:])
    return expected * conditions.any(1, keepdim=True)  # nothing outside the head
