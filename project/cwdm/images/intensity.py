"""Intensities between files and network, each step with its inverse."""

from collections.abc import Iterable
from functools import reduce
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from cwdm.arrays import Mask, Volume

Rule = Literal["mask", "threshold", "none"]

CLIP_QUANTILES = (0.001, 0.999)
"""Of the whole volume, background included, as published."""


class ClipRange(NamedTuple):
    """The intensities that became 0 and 1; both are float32 numbers."""

    low: float
    high: float


def normalise(volume: Volume) -> tuple[Volume, ClipRange]:
    """Clip a volume to its 0.1 and 99.9 percentiles and map them to 0 and 1, as published.

    Args:
        volume: of any shape, finite, float32.

    Returns:
        The volume in [0, 1], where both ends occur, and the intensities that they stand for.

    Raises:
        ValueError: the percentiles are equal.
    """
    low, high = (np.float32(value) for value in clip_range(volume))
    unit = np.clip(volume, low, high)
    unit -= low
    unit /= high - low
    return unit, ClipRange(float(low), float(high))


def clip_range(volume: Volume) -> ClipRange:
    """The intensities that `normalise` maps to 0 and 1; raises ValueError if they are equal."""
    low, high = (np.float32(value) for value in _quantiles(volume, CLIP_QUANTILES))
    with np.errstate(over="ignore"):
        span = high - low
    if not np.isfinite(span):
        raise ValueError(f"intensities from {low:g} to {high:g} are more than can be scaled; rescale the image")
    if not span > 0:
        raise ValueError(
            f"99.8 % of the voxels have the same intensity ({low:g}), so there is nothing to scale; "
            "check that the image is complete"
        )
    return ClipRange(float(low), float(high))


def denormalise(unit: Volume, clip_range: ClipRange) -> Volume:
    """Map 0 and 1 back to the intensities they stood for; values outside go beyond them."""
    low, high = clip_range
    return unit * np.float32(high - low) + np.float32(low)


def brain_mask(volumes: Iterable[npt.NDArray[np.generic]]) -> Mask:
    """Union of the nonzero voxels of skull-stripped volumes (X, Y, Z), before they are normalised.

    Interpolation leaves negative values inside brains, so anything but zero counts.
    """
    return reduce(np.logical_or, (volume != 0 for volume in volumes))


def foreground(unit: Volume, rule: Rule, brain_mask: Mask, threshold: float) -> Mask:
    """Which voxels are kept: those of the mask, those above the threshold (in [0, 1] units), or all."""
    if rule == "mask":
        return brain_mask
    if rule == "threshold":
        return unit > np.float32(threshold)
    return np.ones(unit.shape, np.bool_)


def _quantiles(volume: Volume, quantiles: tuple[float, ...]) -> list[float]:
    """What np.quantile(volume, quantiles) gives in float64, without sorting the background.

    Most of a skull-stripped volume is 0. The sorted volume is the negative values, the zeros, the positive
    values; only those parts that hold a wanted rank are partitioned. Several times as fast as np.quantile.
    """
    values = volume.ravel(order="K")
    negative, positive = values[values < 0], values[values > 0]
    first_positive = values.size - positive.size

    def at(rank: int) -> float:
        if rank < negative.size:
            negative.partition(rank)
            return float(negative[rank])
        if rank < first_positive:
            return 0.0
        positive.partition(rank - first_positive)
        return float(positive[rank - first_positive])

    def between(quantile: float) -> float:
        position = quantile * (values.size - 1)
        rank = int(position)
        neighbours = at(rank), at(min(rank + 1, values.size - 1))
        return float(np.quantile(neighbours, position - rank))

    return [between(quantile) for quantile in quantiles]
