"""What training data tell a prior: the sums over voxels that a regression is solved from, and how."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_DEVIATION = 1e-4  # of the regression's errors, so that half precision can hold it

RIDGE = 1e-2
"""In units of each input's variance."""

Examples = Iterable[tuple[Tensor, Tensor, Tensor, int]]
"""Conditions (given, X, Y, Z), what should come out (out, X, Y, Z), where to learn from it, bool (X, Y, Z), and the
target's number."""


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
