"""Intensities between files and network, each step with its inverse."""

from collections.abc import Iterable
from functools import reduce
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from cwdm.arrays import Mask, Volume

Rule = Literal["mask", "threshold", "none"]
Intensities = Literal["published", "brain"]

CLIP_QUANTILES = (0.001, 0.999)
"""Of the whole volume, background included, as published."""

BRAIN_QUANTILE, BRAIN_LEVEL = 0.95, 0.5
"""With the intensities `brain`, this quantile of the voxels that are not 0 becomes this level."""

TYPICAL_LEVEL = {"t1n": 0.91, "t1c": 0.71, "t2w": 0.71, "t2f": 0.83}
"""Where the same quantile lies, as a rule, in an image that is scaled to [0, 1] as published."""

TAIL_QUANTILES = (0.99, 0.999)
"""Of the whole volume: from where on a prediction is stretched, and by which an image is scaled to [0, 1]."""

TAIL_POWER = 4
"""Of the way between the two, by which the stretch grows: little is stretched much, and there is no edge."""


class ClipRange(NamedTuple):
    """The intensities that became 0 and 1; both are float32 numbers."""

    low: float
    high: float


def normalise(volume: Volume, intensities: Intensities = "published") -> tuple[Volume, ClipRange]:
    """Clip a volume to its `clip_range` and map that to [0, 1].

    Args:
        volume: of any shape, finite, float32.

    Returns:
        The volume in [0, 1], and the intensities that 0 and 1 stand for.

    Raises:
        ValueError: there is nothing to scale.
    """
    low, high = (np.float32(value) for value in clip_range(volume, intensities))
    unit = np.clip(volume, low, high)
    unit -= low
    unit /= high - low
    return unit, ClipRange(float(low), float(high))


def clip_range(volume: Volume, intensities: Intensities = "published") -> ClipRange:
    """The intensities that become 0 and 1.

    `published`: the 0.1 and 99.9 percentiles of the whole volume. Where the upper one lies hangs on a few bright
    voxels, vessels and tumours, which the other modalities do not tell.
    `brain`: 0, so that the background of a skull-stripped volume stays what it is, and twice the 95th percentile of
    the voxels that are not 0. That is how bright the bulk of the brain is, with room for what is brighter.

    Raises:
        ValueError: they are equal, or too far apart.
    """
    if intensities == "brain":
        return _brain_range(volume)
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


def _brain_range(volume: Volume) -> ClipRange:
    inside = volume[volume != 0]
    # The quantile itself and no value between two, so that it is the same for every size of sample.
    place = int(BRAIN_QUANTILE * (inside.size - 1)) if inside.size else 0
    bright = float(np.partition(inside, place)[place]) if inside.size else 0.0
    if not bright > 0:
        raise ValueError(f"expected a brain brighter than 0, found {bright:g} at its 95th percentile")
    with np.errstate(over="ignore"):
        high = np.float32(bright) / np.float32(BRAIN_LEVEL)
    if not np.isfinite(high):
        raise ValueError(f"intensities up to {bright:g} are more than can be scaled; rescale the image")
    return ClipRange(0.0, float(high))


def as_published(unit: Volume, modality: str, intensities: Intensities) -> Volume:
    """A volume in the network's range as it would be, as a rule, by its own percentiles; beyond 1 where brighter.

    Args:
        unit: of [0, 1], or a standard deviation in its units.
    """
    if intensities == "published":
        return unit
    return unit * np.float32(TYPICAL_LEVEL[modality] / BRAIN_LEVEL)


def with_tail(unit: Volume, std: Volume | None = None) -> Volume:
    """A predicted volume whose brightest voxels are stretched, so that its percentiles lie as an acquired image's.

    A prediction is the mean of what may be, which is less bright than the truth in its few brightest voxels, for
    nobody knows where these are. Whoever scales it by its own percentiles would see all of it too bright. How bright
    they are is known: as bright as in an acquired image as a rule, and as in the mean with errors of the predicted
    size, whichever is more. Nothing becomes darker, all else stays as it is, and the order of the intensities does too.

    Args:
        unit: 0 in the background, 1 where the 99.9 percentile of an acquired image lies as a rule.
        std: standard deviation of its voxels' errors, 0 in the background; None: not known.
    """
    start, found = _quantiles(unit, TAIL_QUANTILES)
    if not 0 < start < found:
        return unit
    wanted = max(1.0, found)
    if std is not None:
        errors = std * np.random.default_rng(0).standard_normal(std.shape, np.float32)
        wanted = max(wanted, *_quantiles(unit + errors, TAIL_QUANTILES[1:]))
    way = (unit - np.float32(start)) / np.float32(found - start)
    np.clip(way, 0, 1, out=way)
    return unit + np.float32(wanted - found) * np.power(way, np.float32(TAIL_POWER))


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
