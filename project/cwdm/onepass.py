"""A network that predicts an image in one pass, from any of the other images: its mean and how far off it may be.

One evaluation has the accuracy of the mean of many samples, whose place it takes; what is lost is the texture of a
single sample. The network learns what the linear-Gaussian prior of the images that are given does not know: by how many
of its standard deviations the mean lies beside, and how much wider or narrower the truth is spread around it.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cwdm.least_squares import SMALLEST_DEVIATION, Examples, cross_products, linear, root_mean_squares
from cwdm.unet import UNet, UNetConfig, check_shape
from cwdm.wavelet import LLL_DIVISOR, dwt, idwt

MOST_LOG_RATIO = 8.0
"""Standard deviations are a 55th to 55 times the prior's."""

ROUNDING = 1e-5
"""Of voxels, by the wavelet transform and its inverse."""

RIDGE = 1e-3
"""Of a prior, in units of each coefficient's variance."""


class Prior(nn.Module):
    """A linear Gaussian model of each voxel's clean coefficients for every target and set of images that are given.

    Every target is one of the images, and any of the others may be given. A target's coefficients are normal, with the
    mean W c + b of those that are given, c (or 0 where all of these are 0), and a standard deviation for each band.
    With `products`, c holds the coefficients of the squares and products of the images too: one contrast follows from
    another by a curve, which few patients suffice for.
    Until `fit`, W c is the mean of what is given, and all standard deviations are 1; training leaves them as they are.

    Args:
        images: how many there are.
        products: whether c holds those of pairs of images.
        bands: coefficients of a voxel of each.
    """

    def __init__(self, images: int, products: bool = False, bands: int = 8) -> None:
        super().__init__()
        self.images, self.bands = images, bands
        self.pairs = list(itertools.combinations_with_replacement(range(images), 2)) if products else []
        # By the target and a number whose bit i says that image i is given.
        sets, coefficients = 2**images, images * bands
        with torch.device("cpu"):  # on the meta device, arithmetic loads PyTorch's compiler
            shown = (torch.arange(sets)[:, None] >> torch.arange(images)) & 1
            mean = shown / shown.sum(1, keepdim=True).clamp(min=1)
            weight = torch.einsum("si,ab->saib", mean, torch.eye(bands)).flatten(2).repeat(images, 1, 1, 1)
            weight = F.pad(weight, (0, len(self.pairs) * bands))
        self.weight = nn.Parameter(weight.to(torch.get_default_device()), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(images, sets, bands), requires_grad=False)
        self.deviation = nn.Parameter(torch.ones(images, sets, bands), requires_grad=False)
        self.magnitude = nn.Parameter(torch.ones(coefficients), requires_grad=False)  # conditions' root mean square

    def forward(
        self, conditions: Tensor, given: Tensor, target: Tensor, volumes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the target's coefficients.

        Args:
            conditions: coefficients (B, images * bands, X, Y, Z), those of images that are not given being 0.
            given: (B, images) bool.
            target: (B,) numbers of images.
            volumes: the images (B, images, 2 X, 2 Y, 2 Z), if there is no need to make them of their coefficients.

        Returns:
            (B, bands, X, Y, Z), (B, bands, 1, 1, 1), float32.
        """
        number = (given.long() << torch.arange(self.images, device=given.device)).sum(1)
        weight, bias = self.weight[target, number].float(), self.bias[target, number].float()
        deviation = self.deviation[target, number].float()[..., None, None, None]
        own = self.images * self.bands
        mean, places = linear(weight[:, :, :own], bias, conditions.float()), weight[:, :, own:].split(self.bands, 2)
        if self.pairs:
            volumes = idwt(conditions.float()) if volumes is None else volumes
            for pair, part in zip(self.pairs, places, strict=True):  # one at a time, for the sake of memory
                if given[:, list(pair)].all(1).any():
                    mean = mean + torch.einsum("boi,bixyz->boxyz", part, dwt(product(volumes, pair)))
        return mean, deviation

    @torch.no_grad()
    def fit(self, examples: Examples) -> None:
        """Ridge regression for each target and set of images, from all examples that show those and maybe others.

        Few patients give many voxels, yet little variety: so each coefficient is taken in units of its standard
        deviation, and weights that the data hardly determine are drawn towards 0. Without an example for it, a model
        stays the mean of what is given.
        """
        images, bands, sets, constant = self.images, self.bands, 2**self.images, self.weight.shape[-1]
        grouped = (
            (self._with_products(conditions), *rest, target * sets + shown_in(conditions, images))
            for conditions, *rest, target in examples
        )
        sums, voxels = cross_products(grouped, images * sets, bands, constant)
        magnitude = root_mean_squares(sums[:, : constant + 1, : constant + 1], voxels)
        self.magnitude.copy_(magnitude[: len(self.magnitude)])
        needs = [{i} for i in range(images)] + [set(pair) for pair in self.pairs]
        for target, number in itertools.product(range(images), range(1, sets)):
            with_all = [other for other in range(sets) if other & number == number]
            found = sums.unflatten(0, (images, sets))[target, with_all].sum(0)
            if number >> target & 1 or found[constant, constant] == 0:
                continue
            covariance, mean = covariances(found, constant)
            inputs = [i for i in range(constant) if all(number >> image & 1 for image in needs[i // bands])]
            outputs = slice(constant + 1, None)
            within, across = covariance[inputs][:, inputs], covariance[inputs][:, outputs]
            weight = ridge(within, across)
            left = covariance.diagonal()[outputs] + (weight * (weight @ within - 2 * across.mT)).sum(1)
            self.weight[target, number] = 0
            self.weight[target, number, :, inputs] = weight.float()
            self.bias[target, number] = mean[outputs] - weight @ mean[inputs]
            self.deviation[target, number] = left.clamp(min=SMALLEST_DEVIATION**2).sqrt()

    def _with_products(self, conditions: Tensor) -> Tensor:
        """Coefficients of the images, and of their products: (images * bands, X, Y, Z) -> (given, X, Y, Z)."""
        if not self.pairs:
            return conditions
        volumes = idwt(conditions[None])
        return torch.cat((conditions, *(dwt(product(volumes, pair))[0] for pair in self.pairs)))


def product(volumes: Tensor, pair: tuple[int, int]) -> Tensor:
    """Of two of the images (B, N, X, Y, Z), or the square of one: (B, 1, X, Y, Z)."""
    first, second = pair
    return volumes[:, first, None] * volumes[:, second, None]


def shown_in(conditions: Tensor, images: int) -> int:
    """Number of the set of images that are not 0 everywhere: of coefficients (images * bands, X, Y, Z)."""
    shown = conditions.unflatten(0, (images, -1)).flatten(1).any(1)
    return sum(1 << i for i in range(images) if shown[i])


def ridge(within: Tensor, across: Tensor) -> Tensor:
    """Weights (out, given) of standardised inputs' ridge regression, from their covariances with each other, (given,
    given), and with what should come out, (given, out)."""
    scale = within.diagonal().sqrt().clamp(min=1e-12)
    within = within / scale / scale[:, None] + RIDGE * torch.eye(len(scale))
    return (torch.linalg.solve(within, across / scale[:, None]) / scale[:, None]).mT


def covariances(sums: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """Covariances (N, N) and means (N,) of what `cross_products` summed up, the constant's being 0 and 1."""
    mean = sums[constant] / sums[constant, constant]
    return sums / sums[constant, constant] - mean[:, None] * mean, mean


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
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.given_embed = nn.Linear(config.given, config.embedding, bias=False)
        self.prior = Prior(config.given, config.products)

    def forward(self, conditions: Tensor, given: Tensor, target: Tensor) -> Prediction:  # type: ignore[override]
        check_shape(conditions, 8 * self.config.given, self.config)
        with torch.autocast(conditions.device.type, enabled=False):  # what is added up to the end stays exact
            volumes = idwt(conditions.float())
            expected, deviation = self.prior(conditions, given, target, volumes)
            brain = brain_of(volumes)
            del volumes  # whole images, whose memory the network can use
        magnitude = self.prior.magnitude.float()
        own = magnitude.unflatten(0, (-1, 8))[target]
        network_input = torch.cat((expected / unit(own), conditions.float() / unit(magnitude[None])), dim=1)
        dtype = self.stem.weight.dtype
        emb = self.embed(torch.zeros_like(target), target) + self.given_embed(given.to(dtype))
        output = self.denoise(network_input.to(dtype), emb).float()
        displacement, log_ratio = output.chunk(2, dim=1)
        mean = dwt(idwt(expected + deviation * displacement) * brain)
        return Prediction(mean, deviation, MOST_LOG_RATIO * torch.tanh(log_ratio / MOST_LOG_RATIO))


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
