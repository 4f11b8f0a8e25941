"""Priors fitted to training data, before a network learns what they do not know."""

import itertools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from cwdm.onepass import Prior
from cwdm.regression import Regression
from cwdm.wavelet import LLL_DIVISOR, dwt, idwt

SMALLEST_DEVIATION = 1e-4  # of the regression's errors, so that half precision can hold it

RIDGE = 1e-2
"""In units of each input's variance."""

ORTHONORMAL = torch.tensor([LLL_DIVISOR] + 7 * [1.0], dtype=torch.float64)
"""By which coefficients are multiplied to be those of the orthonormal transform."""

Examples = Iterable[tuple[Tensor, Tensor, Tensor, int]]
"""Conditions (given, X, Y, Z), what should come out (out, X, Y, Z), where to learn from it, bool (X, Y, Z), and the
target's number."""


@torch.no_grad()
def fit_regression(regression: Regression, examples: Examples) -> None:
    """Least squares."""
    given = regression.weight.shape[2]
    sums, voxels = cross_products(examples, *regression.weight.shape)
    squares, products = sums[:, : given + 1, : given + 1], sums[:, : given + 1, given + 1 :]
    # A condition that is always 0, such as the target itself, gets the weight 0.
    ridge = 1e-9 * squares.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] * torch.eye(given + 1)
    solution = torch.linalg.solve(squares + ridge + 1e-9 * torch.eye(given + 1), products)
    regression.weight.copy_(solution[:, :-1].mT)
    regression.bias.copy_(solution[:, -1])
    left = sums.diagonal(dim1=1, dim2=2)[:, given + 1 :] - (solution * products).sum(1)
    count = squares[:, -1, -1:]
    deviation = (left.clamp(min=0) / count).sqrt().clamp(min=SMALLEST_DEVIATION)
    regression.deviation.copy_(deviation.where(count > 0, 1))
    regression.magnitude.copy_(root_mean_squares(squares, voxels))


@torch.no_grad()
def fit_prior(prior: Prior, examples: Examples) -> None:
    """Ridge regression for each target and set of images, from all examples that show those and maybe others.

    Few patients give many voxels, yet little variety: so each term is taken in units of its standard deviation, and
    weights that the data hardly determine are drawn towards 0. Without an example for it, a model stays the mean of
    what is given.
    """
    images, sets, terms = prior.images, 2**prior.images, prior.weight.shape[-1]
    sums, squares, voxels = _sums(prior, examples)
    prior.magnitude.copy_((squares / voxels.repeat_interleave(8)).sqrt().where(squares > 0, 1))
    needs = [{i} for i in range(images)] + [set(pair) for pair in prior.pairs]
    for target, number in itertools.product(range(images), range(1, sets)):
        found = sums[target, [other for other in range(sets) if other & number == number]].sum(0)
        # Products of voxels are those of their orthonormal coefficients; the constant 1 is the last term.
        whole = (found * ORTHONORMAL.square()[:, None, None]).sum(0)
        if number >> target & 1 or not whole[terms, terms]:
            continue
        covariance, mean = covariances(whole, terms)
        inputs = [i for i in range(terms) if all(number >> image & 1 for image in needs[i])]
        weight = ridge(covariance[inputs][:, inputs], covariance[inputs, -1])
        bias = mean[-1] - weight @ mean[inputs]
        error = torch.zeros(terms + 2, dtype=torch.float64)
        error[[*inputs, terms, terms + 1]] = torch.cat((-weight, torch.stack((-bias, torch.ones_like(bias)))))
        left = error @ found @ error / (whole[terms, terms] / 8)  # of each block's coefficients
        prior.weight[target, number] = 0
        prior.weight[target, number, inputs] = weight.float()
        prior.bias[target, number] = bias
        prior.deviation[target, number] = left.clamp(min=SMALLEST_DEVIATION**2).sqrt()


def _sums(prior: Prior, examples: Examples) -> tuple[Tensor, Tensor, Tensor]:
    """Of each band's coefficients, over the blocks to learn from.

    Returns:
        Products of the terms', of those of the constant 1 and of the target's, each with each, by target and set of
        images (N, 2^N, 8, terms + 2, terms + 2); squares of the images' (8 N,); blocks with each of these (N,).
    """
    images, terms = prior.images, prior.weight.shape[-1]
    sums = torch.zeros(images, 2**images, 8, terms + 2, terms + 2, dtype=torch.float64)
    squares, voxels = torch.zeros(images * 8, dtype=torch.float64), torch.zeros(images, dtype=torch.float64)
    for conditions, wanted, inside, target in examples:
        volumes = idwt(conditions[None])
        places = [*volumes[0], *(volumes[0, first] * volumes[0, second] for first, second in prior.pairs)]
        rows = dwt(torch.stack((*places, torch.ones_like(places[0])))[:, None])
        rows = torch.cat((rows, wanted[None]))[:, :, inside].double().transpose(0, 1)
        shown = conditions.unflatten(0, (images, 8)).flatten(1).any(1)
        sums[target, sum(1 << i for i in range(images) if shown[i])] += rows @ rows.mT
        squares += conditions[:, inside].double().square().sum(1)
        voxels += inside.sum() * shown
    return sums, squares, voxels


def cross_products(examples: Examples, groups: int, out: int, given: int) -> tuple[Tensor, Tensor]:
    """Sums over the voxels of each group of examples, and in how many voxels each condition was there.

    Args:
        examples: with the number of their group, such as the target's.

    Returns:
        Products of conditions, a constant and what should come out, each with each, (groups, given + 1 + out,
        given + 1 + out) float64; (given,).
    """
    sums = torch.zeros(groups, given + 1 + out, given + 1 + out, dtype=torch.float64)
    voxels = torch.zeros(given, dtype=torch.float64)
    for conditions, wanted, inside, group in examples:
        x = F.pad(conditions[:, inside].double(), (0, 0, 0, 1), value=1.0)
        rows = torch.cat((x, wanted[:, inside].double()))
        sums[group] += rows @ rows.mT
        voxels += inside.sum() * conditions.flatten(1).any(1)
    return sums, voxels


def root_mean_squares(squares: Tensor, voxels: Tensor) -> Tensor:
    """Of each condition, where it was there: (given,); 1 where it never was."""
    found = (squares.diagonal(dim1=1, dim2=2)[:, :-1].sum(0) / voxels).sqrt()
    return found.where(found > 0, 1)


def ridge(within: Tensor, across: Tensor) -> Tensor:
    """Weights (given,) of standardised inputs' ridge regression, from their covariances with each other, (given,
    given), and with what should come out, (given,)."""
    scale = within.diagonal().sqrt().clamp(min=1e-12)
    within = within / scale / scale[:, None] + RIDGE * torch.eye(len(scale))
    return torch.linalg.solve(within, across / scale) / scale


def covariances(sums: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """Covariances (N, N) and means (N,) from sums of products (N, N), the constant's being 0 and 1."""
    mean = sums[constant] / sums[constant, constant]
    return sums / sums[constant, constant] - mean[:, None] * mean, mean
