"""An automatic check of every output: `ok`, `look` (review it) or `reject`, with the reason in plain words.

It asks whether an output can be what it claims to be, from the output itself, the conditions and, where there are
several samples or one pass predicts it, the standard deviation. It knows no truth: a plausible image of the wrong
anatomy passes. What it catches and what it misses is the table that `benchmarks/quality.py` prints.

Everything is measured on [0, 1]: the conditions by their own percentiles, the output by the clipping range that it
was written with. `CHECKS` is what is measured, and from where on it is a fault. Ranges named there were measured inside
the brains of two real patients and of phantoms.
"""

from collections.abc import Callable, Mapping
from functools import cached_property, reduce
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from cwdm.arrays import Mask, Volume, block_means, bounding_box
from cwdm.inference.outcome import VERDICTS, Quality, Verdict

AnyVolume = TypeVar("AnyVolume", Volume, Mask)
Measured = float | list[tuple[float, str]] | None

EMPTY = np.float32(0.005)
"""At or below this a voxel counts as empty. Brains have 0.2 % of their voxels there at most, the CSF in FLAIR too."""

NOISY = 0.35
"""Roughness (see `_roughness`) from which on an image counts as noise: white noise has 1, images have 0.03 to 0.16."""

NEVER = np.inf
SPIKE_HEIGHT, SHIFT_GAIN = np.float32(0.25), 1.2
"""How much better shifted edges have to fit, so that a flat maximum is not taken for a shift."""

LEAST_SHIFT, LEAST_MATCH = 3, 0.3
"""Voxels, as the search is exact to 2; correlation of edges, of which other modalities of a head have 0.6 and more."""

SIGNS = {
    "t1n": {"t1c": 1, "t2w": -1, "t2f": 1},
    "t1c": {"t1n": 1, "t2w": -1},
    "t2w": {"t1n": -1, "t1c": -1},
    "t2f": {"t1n": 1},
}
"""Signs of the correlations between modalities inside the brain: water is dark in T1 weighting and in FLAIR, bright in
T2 weighting, and far more of the brain is CSF against tissue than tumour. Pairs of no certain sign are left out."""

WIDE = np.float32(0.10)
"""A standard deviation as large as what grey and white matter differ by."""

REGION = 10
"""Edge in voxels of the regions of which one may be less certain than the brain: 1 mL at 1 mm."""

ENDS = (("right", "left"), ("front", "back"), ("bottom", "top"))
"""What lies at the first and at the last index of each axis of a volume stored LPS."""


class Views:
    """What the checks look at, and the measures; see `assess` for the arguments.

    A measure is a value, or values with words for the message; None where there is nothing to measure.

    Attributes:
        output, conditions, brain: inside the box around the brain.
        mask: the brain in the whole volume.
        values: (N,) of the output inside the brain.
        std: standard deviation; `predicted` or over samples.
    """

    def __init__(
        self,
        output: Volume,
        conditions: Mapping[str, Volume],
        mask: Mask,
        target: str,
        std: Volume | None,
        predicted: bool = False,
    ) -> None:
        box = bounding_box(mask, margin=1)
        self.output, self.brain, self.mask, self.target = output[box], mask[box], mask, target
        self.conditions = {name: volume[box] for name, volume in conditions.items()}
        self.std, self.predicted = None if std is None else std[box], predicted
        self.values = self.output[self.brain]
        self.p5, self.median, self.p95, self.p99 = map(float, np.percentile(self.values, (5, 50, 95, 99)))

    def empty(self) -> float:
        return 1 - float(np.mean(self.values > EMPTY))

    def empty_slices(self) -> Measured:
        return [_empty_end(self.output > EMPTY, self.brain)]

    def saturated(self) -> float:
        return float(np.mean(self.values >= np.float32(0.999)))

    @cached_property
    def roughness(self) -> float:
        """Mean squared difference of neighbours over twice the variance: 1 for white noise, 0 for a constant.

        The ratio of von Neumann (Ann Math Stat 12:367, 1941), over the pairs inside the brain along the three axes.
        """
        variance, squares, pairs = float(np.var(self.values, dtype=np.float64)), 0.0, 0
        for axis in range(3):
            first, second = (_along(axis, these, slice(None)) for these in (slice(None, -1), slice(1, None)))
            both, difference = self.brain[first] & self.brain[second], self.output[first] - self.output[second]
            squares += float(np.sum(np.square(difference), where=both, dtype=np.float64))
            pairs += int(np.count_nonzero(both))
        return squares / pairs / (2 * variance) if pairs and variance > 0 else 0.0

    def spikes(self) -> Measured:
        """Share of the inner brain's voxels that stand out from all six neighbours, which says nothing in noise."""
        if self.roughness >= NOISY:
            return None
        inner, middle, (low, high) = _eroded(self.brain), self.output[_MIDDLE], _neighbours(self.output)
        stands_out = (middle > high + SPIKE_HEIGHT) | (middle < low - SPIKE_HEIGHT)
        return float(np.count_nonzero(stands_out & inner[_MIDDLE]) / max(1, int(np.count_nonzero(inner))))

    @cached_property
    def correlations(self) -> list[tuple[float, str]]:
        """With each condition that is not constant."""
        every = slice(None, None, 4)  # a quarter of the voxels settles a correlation to the third decimal
        own, others = self.values[every], {name: volume[self.brain][every] for name, volume in self.conditions.items()}
        varying = [(name, other) for name, other in others.items() if np.ptp(other) and np.ptp(own)]
        return [(float(np.corrcoef(own, other)[0, 1]), name) for name, other in varying]

    def expected_sign(self) -> Measured:
        """The mean correlation with the conditions, each counted with the sign that it should have."""
        signs = SIGNS.get(self.target, {})
        signed = [signs[name] * correlation for correlation, name in self.correlations if name in signs]
        return [(float(np.mean(signed)), self.target)] if signed else None

    @cached_property
    def displacement(self) -> tuple[float, float, tuple[int, int, int]] | None:
        """`_best_shift` of the edges against those of the conditions, in steps of two voxels; None if there are few."""
        inner = _eroded(_eroded(self.brain))[::2, ::2, ::2]  # without the outline, which the mask draws
        if np.count_nonzero(inner) < 64:
            return None
        mean = np.mean([_centred(_edges(volume), inner) for volume in self.conditions.values()], axis=0)
        found = _best_shift(_centred(_edges(self.output), inner), mean)
        return found if np.isfinite(found[0]) else None

    def match(self) -> Measured:
        """Correlation of the edges with those of the conditions."""
        return self.displacement and self.displacement[0]

    def shift(self) -> Measured:
        """Voxels by which the edges lie beside those of the conditions, if they fit well there."""
        if not self.displacement:
            return None
        match, shifted_match, shift = self.displacement
        distance = 2 * float(np.linalg.norm(shift))
        moved = distance >= LEAST_SHIFT and shifted_match > SHIFT_GAIN * max(match, 0) and shifted_match >= LEAST_MATCH
        where = (f"{2 * abs(step)} to the {ENDS[axis][step > 0]}" for axis, step in enumerate(shift) if step)
        return [(distance if moved else 0.0, ", ".join(where))]

    def doubt(self, predicted: bool, measure: Callable[[Volume], float]) -> Measured:
        """A measure of the standard deviation inside the brain, if that is of this kind."""
        return float(measure(self.std[self.brain])) if self.std is not None and self.predicted == predicted else None

    def doubtful_region(self) -> Measured:
        """How many times the brain's the predicted std is where it is largest, and where that is.

        Over means of blocks that are at least half brain, against their median, or against a third of `WIDE` where
        that is less: so three times means a region of that size in which the std reaches `WIDE`.
        """
        if self.std is None or not self.predicted:
            return None
        share = block_means(self.brain, REGION)
        means = block_means(np.where(self.brain, self.std, 0), REGION)[share >= 0.5] / share[share >= 0.5]
        if means.size < 8:
            return None
        largest = int(np.argmax(means))
        place = np.argwhere(share >= 0.5)[largest] / np.maximum(1, np.array(share.shape) - 1)
        where = [ends[int(at > 0.5)] for at, ends in zip(place, ENDS, strict=True) if abs(at - 0.5) > 1 / 6]
        return [(float(means[largest] / max(np.median(means), WIDE / 3)), ", ".join(where) or "middle")]

    def cut_off(self) -> Measured:
        """Largest cross-section at an edge of the volume, of the largest along that axis, and which edge."""
        areas = [(_areas(self.mask, axis), ends) for axis, ends in enumerate(ENDS)]
        found = [(float(area[i] / area.max()), ends[i]) for area, ends in areas for i in (0, -1)]
        return [max(found, key=lambda item: item[0])]

    def short_conditions(self) -> Measured:
        # On [0, 1] the background is 0 only where nothing is negative: what it is there stands outside the brain.
        flat, outside = self.brain.all(), ~self.brain
        levels = {
            name: np.float32(0 if flat else np.median(volume[outside])) for name, volume in self.conditions.items()
        }
        ends = [
            (name, _empty_end(np.abs(self.conditions[name] - level) > EMPTY, self.brain))
            for name, level in levels.items()
        ]
        return [(n, f"{name}, a condition, ends {n} slices before the brain at the {end}") for name, (n, end) in ends]

    def brightest(self) -> Measured:
        return [(float(np.percentile(volume[self.brain], 99)), name) for name, volume in self.conditions.items()]


# Slices, neighbours, edges


def _empty_end(full: Mask, brain: Mask) -> tuple[int, str]:
    """Most slices without content at one end of the brain, and which end that is."""
    found = []
    for axis, ends in enumerate(ENDS):
        expected, there = _areas(brain, axis), _areas(full & brain, axis)
        empty = (there < 0.1 * expected)[expected > 0]
        for flags, end in zip((empty, empty[::-1]), ends, strict=True):
            found.append((len(flags) if flags.all() else int(np.argmin(flags)), end))
    return max(found, key=lambda item: item[0])


def _areas(mask: Mask, axis: int) -> npt.NDArray[np.intp]:
    """Voxels of a mask in each slice across an axis."""
    return np.asarray(np.count_nonzero(mask, axis=tuple({0, 1, 2} - {axis})))


_MIDDLE = (slice(1, -1), slice(1, -1), slice(1, -1))


def _along(axis: int, these: slice, others: slice) -> tuple[slice, ...]:
    return tuple(these if other == axis else others for other in range(3))


def _neighbours(volume: AnyVolume) -> tuple[AnyVolume, AnyVolume]:
    """The least and the greatest of the six neighbours of every voxel but those at the edge of the volume."""
    beside = [
        volume[_along(axis, these, slice(1, -1))] for axis in range(3) for these in (slice(None, -2), slice(2, None))
    ]
    return reduce(np.minimum, beside), reduce(np.maximum, beside)


def _eroded(mask: Mask) -> Mask:
    """The voxels all of whose six neighbours are inside; those at the edge of the volume are not."""
    inner = np.zeros_like(mask)
    inner[_MIDDLE] = mask[_MIDDLE] & _neighbours(mask)[0]
    return inner


def _edges(volume: Volume) -> Volume:
    """Length of the gradient, at every other voxel, of the volume averaged over two; the sign of a modality is gone."""
    halves = block_means(volume, 2)
    edges = np.zeros([-(-length // 2) for length in volume.shape], np.float32)
    inside = edges[tuple(slice(n) for n in halves.shape)]
    for axis in range(3):
        if halves.shape[axis] > 1:
            inside += np.square(np.gradient(halves, axis=axis))
    return np.sqrt(edges)


def _centred(edges: Volume, inner: Mask) -> Volume:
    """Mean 0 and length 1 inside, 0 outside; all 0 where nothing varies."""
    centred = np.where(inner, edges - edges[inner].mean(), np.float32(0))
    length = float(np.linalg.norm(centred))
    return (centred / length).astype(np.float32) if length > 1e-12 else np.zeros_like(centred)


def _best_shift(output: Volume, conditions: Volume, reach: int = 8) -> tuple[float, float, tuple[int, int, int]]:
    """Correlation without a shift, the best one with a shift of at most `reach`, and that shift.

    Cross-correlation by Fourier transform, with room for the reach, so that nothing comes round the other end.
    """
    size = [length + reach for length in output.shape]
    axes = (0, 1, 2)
    product = np.fft.rfftn(output, size, axes) * np.conj(np.fft.rfftn(conditions, size, axes))
    every = np.fft.irfftn(product, size, axes)
    length = float(np.linalg.norm(conditions))
    steps = np.r_[0 : reach + 1, -reach:0]
    near = every[np.ix_(steps, steps, steps)] / (length or np.nan)
    x, y, z = (int(steps[index]) for index in np.unravel_index(int(np.argmax(near)), near.shape))
    return float(near[0, 0, 0]), float(near.max()), (x, y, z)


def _share_of_wide(std: Volume) -> float:
    return float(np.mean(std >= WIDE))


# What is measured, and from where on it is a fault


class Check(NamedTuple):
    """A row of the table of checks.

    Attributes:
        metric: the value's name in the record, with the words in it; empty for what is not recorded.
        measure: see `Views`.
        limits: the value from which on the output should be reviewed, and the one from which on it is rejected. Low
            values are the faulty ones where the second is below the first. None: recorded and never judged.
        message: with `{value}`, `{percent}` and `{words}`.
        unless: another metric: where that is at fault, this one says nothing more.
    """

    metric: str
    measure: Callable[[Views], Measured]
    limits: tuple[float, float] | None = None
    message: str = ""
    unless: str = ""


CHECKS = (
    # Full images have 0.2 % at most; with a fifth gone, an output is of no use.
    Check("empty", Views.empty, (0.03, 0.20), "{percent} of the brain is empty in the output"),
    # One or two are what differing masks leave, 3 voxels are 3 mm.
    Check(
        "empty_slices", Views.empty_slices, (3, 30), "the output ends {value} slices before the brain at the {words}"
    ),
    Check("median", lambda v: v.median),
    # From the 5th to the 95th percentile: images have 0.28 and more, grey and white matter alone differ by 0.1.
    Check(
        "range",
        lambda v: v.p95 - v.p5,
        (0.12, 0.05),
        "nearly constant: 90 % of the brain lies within {value:.3f} of the range",
    ),
    # Images have 0.81 and more. A constant image is dark or bright too, which says nothing more.
    Check(
        "p99",
        lambda v: v.p99,
        (0.60, 0.20),
        "far too dark: 99 % of the brain is below {value:.2f} of the range",
        "range",
    ),
    # Clipping at the 99.9th percentile of the volume puts 0.7 % of the brain there.
    Check(
        "saturated", Views.saturated, (0.03, 0.20), "{percent} of the brain is at the upper end of the range", "range"
    ),
    # White noise has 1, images have 0.03 to 0.16.
    Check(
        "roughness",
        lambda v: v.roughness,
        (NOISY, 0.60),
        "noisy: neighbours differ by {percent} of what they do in pure noise",
    ),
    # Images have 2e-5 at most at 1 mm, and 2e-4 at 2 mm.
    Check("spikes", Views.spikes, (5e-4, 2e-2), "{value:.2%} of the voxels stand out from all their neighbours"),
    # True images have 0.89 at most, though nothing may enhance in t1c.
    Check("correlation_{words}", lambda v: v.correlations, (0.98, NEVER), "practically the same image as {words}"),
    # True images have 0.2 and more.
    Check(
        "expected_sign",
        Views.expected_sign,
        (-0.1, -NEVER),
        "bright and dark look exchanged, or another contrast than {words}: check which one it is",
    ),
    Check("edges", Views.match, (LEAST_MATCH, -NEVER), "the edges hardly follow those of the conditions", "shift"),
    Check(
        "shift",
        Views.shift,
        (LEAST_SHIFT, NEVER),
        "the anatomy lies beside that of the conditions, by voxels: about {words}",
    ),
    # Noise is 0.01 to 0.03, grey and white matter differ by 0.1.
    Check(
        "spread",
        lambda v: v.doubt(False, np.median),
        (0.05, 0.15),
        "the samples disagree by {percent} of the range in half of the brain",
    ),
    # 5 % is a large tumour's worth.
    Check(
        "spread_share",
        lambda v: v.doubt(False, _share_of_wide),
        (0.05, 0.50),
        "in {percent} of the brain the samples disagree as much as tissues differ",
        "spread",
    ),
    # Of a predicted one: it is as large as the errors, which those of samples need not be. Grey and white matter differ
    # by 0.1, and one grey value all over a brain is off by 0.15 to 0.3.
    Check(
        "std",
        lambda v: v.doubt(True, np.median),
        (float(WIDE), 0.20),
        "half of the brain is predicted to be off by {percent} of the range or more",
    ),
    Check("std_mean", lambda v: v.doubt(True, np.mean)),
    Check("std_share", lambda v: v.doubt(True, _share_of_wide)),
    Check(
        "std_region",
        Views.doubtful_region,
        (3, NEVER),
        "the predicted standard deviation is {value:.1f} times the brain's in a region ({words}), as of a lesion that "
        "the modalities at hand do not tell",
        "std",
    ),
    # Whole brains end before the edge. The output may be right as far as it goes, so this rejects nothing.
    Check(
        "edge_share",
        Views.cut_off,
        (0.05, NEVER),
        "the brain is cut off at the {words}: the field of view is truncated",
    ),
    Check("", Views.short_conditions, (3, NEVER), "{words}"),
    Check(
        "",
        Views.brightest,
        (0.30, -NEVER),
        "{words}, a condition: a few voxels are far brighter than the brain, which is dark for it",
    ),
)
"""In the order in which they are recorded; of equally grave reasons the first stand first."""


def assess(
    output: Volume,
    conditions: Mapping[str, Volume],
    mask: Mask,
    target: str,
    std: Volume | None = None,
    predicted: bool = False,
) -> Quality:
    """Check one output.

    Args:
        output: (X, Y, Z), stored LPS, in [0, 1] where it is as it should be.
        conditions: modality -> (X, Y, Z) in [0, 1], on the same grid.
        mask: brain of the conditions, (X, Y, Z).
        target: the modality that the output should be.
        std: standard deviation (X, Y, Z), in the same units: over the samples, or predicted in one pass.
        predicted: which of the two.

    Returns:
        `reject` for an output that is not finite anywhere in the volume and for an empty mask, without figures.

    Raises:
        ValueError: shapes differ, or there is no condition.
    """
    volumes = (output, *conditions.values(), mask, *(() if std is None else (std,)))
    if not conditions or len({volume.shape for volume in volumes}) > 1 or output.ndim != 3:
        raise ValueError(f"expected volumes (X, Y, Z) of one shape, found {[volume.shape for volume in volumes]}")
    if bad := sum(volume.size - np.count_nonzero(np.isfinite(volume)) for volume in volumes):
        return Quality("reject", (f"{bad} voxels are not finite numbers",), {})
    if not mask.any():
        return Quality("reject", ("the conditions show no brain, so nothing could be checked",), {})
    views = Views(output, conditions, mask, target, std, predicted)
    found = [(check, value, words) for check in CHECKS for value, words in _worded(check.measure(views))]
    figures = {check.metric.format(words=words): float(f"{value:.4g}") for check, value, words in found if check.metric}
    at_fault = {check.metric for check, value, _ in found if check.metric and _verdict(check, value) != "ok"}
    reasons = [
        (_verdict(check, value), check.message.format(value=value, percent=_percent(value), words=words))
        for check, value, words in found
        if check.unless not in at_fault and _verdict(check, value) != "ok"
    ]
    reasons.sort(key=lambda reason: VERDICTS.index(reason[0]))
    return Quality(reasons[0][0] if reasons else "ok", tuple(text for _, text in reasons), figures)


def _worded(measured: Measured) -> list[tuple[float, str]]:
    return [] if measured is None else measured if isinstance(measured, list) else [(measured, "")]


def _verdict(check: Check, value: float) -> Verdict:
    if check.limits is None:
        return "ok"
    review, reject = check.limits
    if reject < review:
        value, review, reject = -value, -review, -reject
    return "reject" if value >= reject else "look" if value >= review else "ok"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
