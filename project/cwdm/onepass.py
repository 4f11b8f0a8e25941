"""A network that predicts an image in one pass, from any of the other images: its mean and how far off it may be.

One evaluation has the accuracy of the mean of many samples, whose place it takes; what is lost is the texture of a
single sample. The network learns what a Gaussian prior of the images that are given does not know: by how many of its
standard deviations the mean lies beside, and how much wider or narrower the truth is spread around it.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cwdm.unet import UNet, UNetConfig, check_shape
from cwdm.wavelet import BANDS, LLL_DIVISOR, dwt, idwt

MOST_LOG_RATIO = 8.0
"""Standard deviations are a 55th to 55 times the prior's."""

ROUNDING = 1e-5
"""Of voxels, by the wavelet transform and its inverse."""

VOXEL_OF_LLL = LLL_DIVISOR / 8**0.5
"""What a voxel is in a block whose coefficients are 1 and seven times 0."""

HIGH_AXES = tuple(band.count("H") for band in BANDS)
"""Along how many axes each band is high."""


class Prior(nn.Module):
    """A Gaussian model of each voxel for every target and set of images that are given: a polynomial of these.

    Every target is one of the images, and any of the others may be given. A target's voxel is normal around b + Σ w v
    of the voxels v that are given, or 0 where all of these are 0; with `products`, around b + Σ w v + Σ w v v', for one
    contrast follows from another by a curve, which few patients suffice for. The wavelet coefficients' errors have a
    standard deviation for each band. A new one has the mean of what is given, and standard deviations of 1; training
    leaves all of it as it is, once it is fitted.

    Args:
        images: how many there are.
        products: whether the polynomial has those of pairs of images.
    """

    def __init__(self, images: int, products: bool = False) -> None:
        super().__init__()
        self.images = images
        self.pairs = list(itertools.combinations_with_replacement(range(images), 2)) if products else []
        # By the target and a number whose bit i says that image i is given.
        sets = 2**images
        with torch.device("cpu"):  # on the meta device, arithmetic loads PyTorch's compiler
            shown = (torch.arange(sets)[:, None] >> torch.arange(images)) & 1
            mean = shown / shown.sum(1, keepdim=True).clamp(min=1)
            weight = F.pad(mean, (0, len(self.pairs))).repeat(images, 1, 1)
        self.weight = nn.Parameter(weight.to(torch.get_default_device()), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(images, sets), requires_grad=False)
        self.deviation = nn.Parameter(torch.ones(images, sets, 8), requires_grad=False)
        self.magnitude = nn.Parameter(torch.ones(images * 8), requires_grad=False)  # coefficients' root mean square

    def forward(self, volumes: Tensor, given: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the target, and standard deviation of its coefficients.

        Args:
            volumes: images (B, N, 2 X, 2 Y, 2 Z), those that are not given being 0.
            given: (B, N) bool.
            target: (B,) numbers of images.

        Returns:
            (B, 1, 2 X, 2 Y, 2 Z), which is for where any image is not 0, and (B, 8, 1, 1, 1), float32.
        """
        number = (given.long() << torch.arange(self.images, device=given.device)).sum(1)
        weight, deviation = self.weight[target, number].float(), self.deviation[target, number].float()
        mean = torch.zeros_like(volumes[:, :1]) + self.bias[target, number].float()[:, None, None, None, None]
        for i, volume in enumerate(volumes.split(1, 1)):
            if given[:, i].any():  # one at a time, for the sake of memory
                slope = torch.zeros_like(mean) + unit(weight[:, i : i + 1])
                for place, (first, second) in enumerate(self.pairs, self.images):
                    if first == i and given[:, second].any():
                        slope.addcmul_(unit(weight[:, place : place + 1]), volumes[:, second : second + 1])
                mean.addcmul_(slope, volume)
        return mean, unit(deviation)


class Prediction(NamedTuple):
    """Coefficients as they may be, each normal around its mean; float32.

    Attributes:
        mean: (B, 8, X, Y, Z), LLL divided by 3.
        deviation: standard deviations by the prior alone (B, 8, 1, 1, 1).
        log_ratio: logarithm of the variances, in units of the prior's (B, 8, X, Y, Z).
    """

    mean: Tensor
    deviation: Tensor
    log_ratio: Tensor

    @property
    def variance(self) -> Tensor:
        """(B, 8, X, Y, Z)."""
        return self.deviation.square() * self.log_ratio.exp()


class OnePassUNet(UNet):
    """Predicts the wavelet coefficients of one image from those of the others that are given.

    `OnePassUNet(config)(conditions, given, target)`: conditions (B, 8 N, X, Y, Z), 0 where they are not given, given
    (B, N) bool, target (B,) -> `Prediction`, the mean that of a volume which is 0 in every voxel where all conditions
    are 0, so that the edge of the brain need not be learned. There is no timestep: blocks are told target and flags in
    its place.

    Of what the prior lacks, the network predicts a smooth field, and how much of the details of each image that is
    given, and of the prior, come on top. So it makes no detail where no image has one: what it has never seen may come
    out too bright or too dark, yet not with a pattern of the wavelets' grid. (Within a block that is a guided filter's
    linear model: He et al., "Guided Image Filtering", 2013.)
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.given_embed = nn.Linear(config.given, config.embedding, bias=False)
        self.prior = Prior(config.given, config.products)

    def forward(self, conditions: Tensor, given: Tensor, target: Tensor) -> Prediction:  # type: ignore[override]
        check_shape(conditions, 8 * self.config.given, self.config)
        conditions = conditions.float()
        with torch.autocast(conditions.device.type, enabled=False):  # what is added up to the end stays exact
            volumes = idwt(conditions)
            brain = brain_of(volumes)
            mean, deviation = self.prior(volumes, given, target)
            del volumes  # whole images, whose memory the network can use
            expected = dwt(mean * brain)
        magnitude = self.prior.magnitude.float()
        own = magnitude.unflatten(0, (-1, 8))[target]
        network_input = torch.cat((expected / unit(own), conditions / unit(magnitude[None])), dim=1)
        dtype = self.stem.weight.dtype
        emb = self.embed(torch.zeros_like(target), target) + self.given_embed(given.to(dtype))
        output = self.denoise(network_input.to(dtype), emb).float()
        field, gains, log_ratio = output.split((1, output.shape[1] - 9, 8), dim=1)
        with torch.autocast(conditions.device.type, enabled=False):
            details = with_gains(torch.cat((expected, conditions), dim=1), gains)
            volume = idwt(expected + details)
            field = field * deviation[:, :1] * VOXEL_OF_LLL
            volume += F.interpolate(field, scale_factor=2, mode="trilinear")
            mean = dwt(volume * brain)
        return Prediction(mean, deviation, MOST_LOG_RATIO * torch.tanh(log_ratio / MOST_LOG_RATIO))


def with_gains(coefficients: Tensor, gains: Tensor) -> Tensor:
    """Sum of the images' details, each times its gain; there is one for bands that are high along one, two and three
    axes each.

    Args:
        coefficients: of M images (B, 8 M, X, Y, Z).
        gains: (B, 3 M, X, Y, Z).

    Returns:
        (B, 8, X, Y, Z), 0 in LLL.
    """
    images = coefficients.shape[1] // 8
    sums = [torch.zeros_like(coefficients[:, 0])]
    for band, axes in enumerate(HIGH_AXES[1:], 1):
        total = gains[:, axes - 1] * coefficients[:, band]
        for image in range(1, images):
            total = total.addcmul(gains[:, 3 * image + axes - 1], coefficients[:, 8 * image + band])
        sums.append(total)
    return torch.stack(sums, dim=1)


def brain_of(volumes: Tensor) -> Tensor:
    """Voxels in which any of the images is not 0, but for rounding: (B, N, X, Y, Z) -> (B, 1, X, Y, Z) bool."""
    return (volumes.abs() > ROUNDING).any(1, keepdim=True)


def unit(channels: Tensor) -> Tensor:
    """(B, C) -> (B, C, 1, 1, 1)."""
    return channels[..., None, None, None]


def voxel_std(variance: Tensor, lll_divisor: float = LLL_DIVISOR) -> Tensor:
    """Standard deviation of each voxel, if the errors of its coefficients are independent.

    The inverse Haar transform is orthonormal: a voxel is the sum of its eight coefficients, each times ±√⅛, so its
    variance is the mean of theirs, whatever the signs.

    Args:
        variance: of coefficients (B, 8, X, Y, Z), LLL divided by `lll_divisor`.

    Returns:
        (B, 1, 2 X, 2 Y, 2 Z).
    """
    mean = (variance[:, :1] * lll_divisor**2 + variance[:, 1:].sum(1, keepdim=True)) / 8
    for axis in (2, 3, 4):
        mean = mean.repeat_interleave(2, axis)
    return mean.sqrt()
