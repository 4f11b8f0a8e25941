"""An automatic check of every output: `ok`, `look` or `reject`, with the reason in plain words.

It asks whether an output can be what it claims to be, from the output itself, the conditions and, where there are
several samples, their spread. It knows no truth: a plausible image of the wrong anatomy passes. What it catches and
what it misses is the table that `benchmarks/quality.py` prints.

Everything is measured on [0, 1]: the conditions by their own percentiles, the output by the clipping range that it
was written with. Ranges named below were measured inside the brains of two real patients and of phantoms.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Volume = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Verdict = Literal["ok", "look", "reject"]

VERDICTS: tuple[Verdict, ...] = ("reject", "look", "ok")
"""Worst first."""


class Limits(NamedTuple):
    """From which value on a figure asks for a look, and from which the output is rejected."""

    look: float
    reject: float


EMPTY = 0.005
"""At or below this a voxel counts as empty. Brains have 0.2 % of their voxels there at most, the CSF in FLAIR too."""

MISSING = Limits(0.03, 0.20)
"""Share of the brain that is empty: many times what a full image has; with a fifth gone, it is of no use."""

EMPTY_SLICES = Limits(3, 30)
"""Slices at one end of the brain that are empty: one or two are what differing masks leave, 3 voxels are 3 mm."""

EDGE_SHARE = Limits(0.05, np.inf)
"""Cross-section of the brain at the edge of the volume, of its largest. Whole brains end before the edge. The output
may be right as far as it goes, so this rejects nothing."""

FLAT = Limits(0.12, 0.05)
"""Range from the 5th to the 95th percentile: images have 0.28 and more, grey and white matter alone differ by 0.1."""

SATURATED = Limits(0.03, 0.20)
"""Share of the brain at or above 0.999: clipping at the 99.9th percentile of the volume puts 0.7 % there."""

BRIGHTEST = Limits(0.60, 0.20)
"""99th percentile: images have 0.81 and more; below, the output is far darker than its scale."""

SQUEEZED = Limits(0.30, -np.inf)
"""99th percentile of a condition: lower, and a few bright voxels have taken its whole range for themselves."""

ROUGH = Limits(0.35, 0.60)
"""Roughness (see `_roughness`): white noise has 1, images have 0.03 to 0.16."""

SPIKES = Limits(5e-4, 2e-2)
"""Share of voxels that differ from all six neighbours by more than SPIKE_HEIGHT; images have 2e-5 at most at 1 mm, and
2e-4 at 2 mm."""

SPIKE_HEIGHT = 0.25

SHIFT = Limits(3, np.inf)
"""Voxels by which the edges of the output lie beside those of the conditions; the search is exact to 2."""

SHIFT_GAIN = 1.2
"""How much better the shifted edges have to fit, so that a flat maximum is not taken for a shift."""

UNRELATED = Limits(0.3, -np.inf)
"""Correlation of the edges with those of the conditions: other contrasts of the same head have 0.6 and more."""

COPIED = Limits(0.98, np.inf)
"""Correlation with one condition: true contrasts have 0.89 at most, though nothing may enhance in t1c."""

INVERTED = Limits(-0.1, -np.inf)
"""Mean correlation with the conditions, each counted with the sign it should have; true contrasts have 0.2 and more."""

SPREAD = Limits(0.05, 0.15)
"""Median standard deviation of the samples: noise is 0.01 to 0.03, grey and white matter differ by 0.1."""

SPREAD_LOCAL, SPREAD_LOCAL_SHARE = 0.10, Limits(0.05, 0.50)
"""Share of the brain in which the samples differ by as much as tissues do; 5 % is a large tumour's worth."""

SIGNS = {
    "t1n": {"t1c": 1, "t2w": -1, "t2f": 1},
    "t1c": {"t1n": 1, "t2w": -1},
    "t2w": {"t1n": -1, "t1c": -1},
    "t2f": {"t1n": 1},
}
"""Signs of the correlations between contrasts inside the brain: water is dark in T1 weighting and in FLAIR, bright in
T2 weighting, and far more of the brain is CSF against tissue than tumour. Pairs of no certain sign are left out."""

ENDS = (("right", "left"), ("front", "back"), ("bottom", "top"))
"""What lies at the first and at the last index of each axis of a volume stored LPS."""


@dataclass(frozen=True)
class Quality:
    """What the check found.

    Attributes:
        reasons: why it is not `ok`, the gravest first, in plain words.
        figures: what was measured, by name; a figure that could not be measured is left out.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    figures: dict[str, float]


class _Finding(NamedTuple):
    verdict: Verdict
    reason: str


def assess(
    output: Volume,
    conditions: Mapping[str, Volume],
    mask: Mask,
    target: str,
    spread: Volume | None = None,
) -> Quality:
    """Check one output.

    Args:
        output: (X, Y, Z), stored LPS, in [0, 1] where it is as it should be.
        conditions: modality -> (X, Y, Z) in [0, 1], on the same grid.
        mask: brain of the conditions, (X, Y, Z).
        target: the modality that the output should be.
        spread: standard deviation over the samples (X, Y, Z), in the same units.

    Returns:
        `reject` for an output that is not finite anywhere in the volume and for an empty mask, without figures.

    Raises:
        ValueError: shapes differ, or there is no condition.
    """
    volumes = (output, *conditions.values(), mask, *(() if spread is None else (spread,)))
    if not conditions or len({volume.shape for volume in volumes}) > 1 or output.ndim != 3:
        raise ValueError(f"expected volumes (X, Y, Z) of one shape, found {[volume.shape for volume in volumes]}")
    if bad := sum(volume.size - np.count_nonzero(np.isfinite(volume)) for volume in volumes):
        return Quality("reject", (f"{bad} voxels are not finite numbers",), {})
    if not mask.any():
        return Quality("reject", ("the conditions show no brain, so nothing could be checked",), {})
    box = _box(mask)
    figures: dict[str, float] = {}
    inside = {name: volume[box] for name, volume in conditions.items()}
    brain = mask[box]
    findings = [
        *_missing(output[box], brain, figures),
        *_intensities(output[box][brain], figures),
        *_texture(output[box], brain, figures),
        *_relations(output[box], inside, brain, target, figures),
        *_structure(output[box], inside, brain, figures),
        *(() if spread is None else _disagreement(spread[box][brain], figures)),
        *_faults_of_conditions(inside, brain, mask, figures),
    ]
    return _summary(findings, figures)


def _summary(findings: list[_Finding], figures: dict[str, float]) -> Quality:
    findings = sorted(findings, key=lambda finding: VERDICTS.index(finding.verdict))
    rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
    return Quality(findings[0].verdict if findings else "ok", tuple(finding.reason for finding in findings), rounded)


def _above(value: float, limits: Limits, reason: str) -> Iterator[_Finding]:
    if value >= limits.look:
        yield _Finding("reject" if value >= limits.reject else "look", reason)


def _below(value: float, limits: Limits, reason: str) -> Iterator[_Finding]:
    yield from _above(-value, Limits(-limits.look, -limits.reject), reason)


# Is there something everywhere?


def _missing(output: Volume, brain: Mask, figures: dict[str, float]) -> Iterator[_Finding]:
    full = output > np.float32(EMPTY)
    share = figures["empty"] = 1 - np.count_nonzero(full & brain) / np.count_nonzero(brain)
    yield from _above(share, MISSING, f"{_percent(share)} of the brain is empty in the output")
    slices, end = _empty_end(full, brain)
    figures["empty_slices"] = slices
    yield from _above(slices, EMPTY_SLICES, f"the output ends {slices} slices before the brain at the {end}")


def _empty_end(full: Mask, brain: Mask) -> tuple[int, str]:
    """Most slices without content at one end of the brain, and which end that is."""
    found = []
    for axis, ends in enumerate(ENDS):
        others = tuple({0, 1, 2} - {axis})
        expected = np.count_nonzero(brain, axis=others)
        there = np.count_nonzero(full & brain, axis=others)
        empty = (there < 0.1 * expected)[expected > 0]
        found += [(_run(empty), ends[0]), (_run(empty[::-1]), ends[1])]
    return max(found, key=lambda item: item[0])


def _run(flags: Mask) -> int:
    """How many are true before the first that is false."""
    return int(np.argmin(flags)) if not flags.all() else len(flags)


# Are the intensities those of an image?


def _intensities(values: Volume, figures: dict[str, float]) -> Iterator[_Finding]:
    p5, median, p95, p99 = (float(value) for value in np.percentile(values, (5, 50, 95, 99)))
    saturated = float(np.mean(values >= np.float32(0.999)))
    figures.update(median=median, range=p95 - p5, p99=p99, saturated=saturated)
    if p95 - p5 < FLAT.look:
        yield from _below(p95 - p5, FLAT, f"nearly constant: 90 % of the brain lies within {p95 - p5:.3f} of the range")
    else:  # a constant image is also dark or bright, which says nothing more
        yield from _below(p99, BRIGHTEST, f"far too dark: 99 % of the brain is below {p99:.2f} of the range")
        yield from _above(saturated, SATURATED, f"{_percent(saturated)} of the brain is at the upper end of the range")


# Is it an image and not noise?


def _texture(output: Volume, brain: Mask, figures: dict[str, float]) -> Iterator[_Finding]:
    rough = figures["roughness"] = _roughness(output, brain)
    if rough >= ROUGH.look:
        yield from _above(rough, ROUGH, f"noisy: neighbours differ by {_percent(rough)} of what they do in pure noise")
        return
    spikes = figures["spikes"] = _spikes(output, brain)
    yield from _above(spikes, SPIKES, f"{spikes:.2%} of the voxels stand out from all their neighbours")


def _roughness(volume: Volume, brain: Mask) -> float:
    """Mean squared difference of neighbours over twice the variance: 1 for white noise, 0 for a constant.

    The ratio of von Neumann (Ann Math Stat 12:367, 1941), over the pairs inside the brain along the three axes.
    """
    variance = float(np.var(volume[brain], dtype=np.float64))
    squares, pairs = 0.0, 0
    for axis in range(3):
        first, second = _neighbours(axis)
        both = brain[first] & brain[second]
        squares += float(np.sum(np.square(volume[first] - volume[second]), where=both, dtype=np.float64))
        pairs += int(np.count_nonzero(both))
    return squares / pairs / (2 * variance) if pairs and variance > 0 else 0.0


def _spikes(volume: Volume, brain: Mask) -> float:
    """Share of the inner brain's voxels that differ from all six neighbours, all above or all below."""
    inner = _eroded(brain)
    middle = (slice(1, -1),) * 3
    if not inner.any():
        return 0.0
    low = np.full(volume[middle].shape, np.inf, np.float32)
    high = -low
    for axis in range(3):
        for shifted in (slice(None, -2), slice(2, None)):
            beside = volume[tuple(shifted if other == axis else slice(1, -1) for other in range(3))]
            np.minimum(low, beside, out=low)
            np.maximum(high, beside, out=high)
    height = np.float32(SPIKE_HEIGHT)
    stands_out = (volume[middle] > high + height) | (volume[middle] < low - height)
    return float(np.count_nonzero(stands_out & inner[middle]) / np.count_nonzero(inner))


# Is it the right contrast?


def _relations(
    output: Volume, conditions: Mapping[str, Volume], brain: Mask, target: str, figures: dict[str, float]
) -> Iterator[_Finding]:
    every = slice(None, None, 4)  # a quarter of the voxels settles a correlation to the third decimal
    values = output[brain][every]
    signed = []
    for name, condition in conditions.items():
        correlation = _correlation(values, condition[brain][every])
        if correlation is None:
            continue
        figures[f"correlation_{name}"] = correlation
        if sign := SIGNS.get(target, {}).get(name):
            signed.append(sign * correlation)
        yield from _above(correlation, COPIED, f"practically the same image as {name}")
    if signed:
        mean = figures["expected_sign"] = float(np.mean(signed))
        yield from _below(
            mean, INVERTED, f"bright and dark look exchanged, or another contrast than {target}: check which one it is"
        )


def _correlation(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float | None:
    """Pearson's; None where one of them is constant."""
    a, b = a - a.mean(dtype=np.float64), b - b.mean(dtype=np.float64)
    size = float(np.sqrt(np.sum(a * a, dtype=np.float64) * np.sum(b * b, dtype=np.float64)))
    return float(np.sum(a * b, dtype=np.float64)) / size if size > 1e-12 else None


# Does it lie where the conditions do?


def _structure(
    output: Volume, conditions: Mapping[str, Volume], brain: Mask, figures: dict[str, float]
) -> Iterator[_Finding]:
    inner = _eroded(_eroded(brain))[::2, ::2, ::2]  # without the outline, which the mask draws
    if np.count_nonzero(inner) < 64:
        return
    mean = np.mean([_centred(_edges(volume), inner) for volume in conditions.values()], axis=0)
    match, shifted_match, shift = _best_shift(_centred(_edges(output), inner), mean)
    if not np.isfinite(match):
        return
    distance = 2 * float(np.linalg.norm(shift))
    moved = distance >= SHIFT.look and shifted_match > SHIFT_GAIN * max(match, 0)
    figures.update(edges=match, shift=distance if moved and shifted_match >= UNRELATED.look else 0.0)
    if figures["shift"]:
        where = ", ".join(f"{2 * abs(step)} to the {ENDS[axis][step > 0]}" for axis, step in enumerate(shift) if step)
        yield _Finding("look", f"the anatomy lies beside that of the conditions, by voxels: about {where}")
    else:
        yield from _below(match, UNRELATED, "the edges hardly follow those of the conditions")


def _edges(volume: Volume) -> Volume:
    """Length of the gradient, at every other voxel, of the volume averaged over two; the sign of a contrast is gone."""
    even = volume[tuple(slice(length - length % 2) for length in volume.shape)]
    halves = even.reshape(even.shape[0] // 2, 2, even.shape[1] // 2, 2, even.shape[2] // 2, 2).mean(axis=(1, 3, 5))
    edges = np.zeros([-(-length // 2) for length in volume.shape], np.float32)
    for axis, length in enumerate(halves.shape):
        if length > 1:
            place = tuple(slice(n) for n in halves.shape)
            edges[place] += np.square(np.gradient(halves, axis=axis))
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


# Do the samples agree?


def _disagreement(values: Volume, figures: dict[str, float]) -> Iterator[_Finding]:
    median, share = float(np.median(values)), float(np.mean(values >= np.float32(SPREAD_LOCAL)))
    figures.update(spread=median, spread_share=share)
    reason = f"the samples disagree by {_percent(median)} of the range in half of the brain"
    widely = list(_above(median, SPREAD, reason))
    yield from widely
    if not widely:
        reason = f"in {_percent(share)} of the brain the samples disagree as much as tissues differ"
        yield from _above(share, SPREAD_LOCAL_SHARE, reason)


# Are the conditions as they should be?


def _faults_of_conditions(
    conditions: Mapping[str, Volume], brain: Mask, mask: Mask, figures: dict[str, float]
) -> Iterator[_Finding]:
    share, end = _cut_off(mask)
    figures["edge_share"] = share
    yield from _above(share, EDGE_SHARE, f"the brain is cut off at the {end}: the field of view is truncated")
    for name, volume in conditions.items():
        # On [0, 1] the background is 0 only where nothing is negative: what it is there stands outside the brain.
        background = float(np.median(volume[~brain])) if not brain.all() else 0.0
        slices, end = _empty_end(np.abs(volume - np.float32(background)) > np.float32(EMPTY), brain)
        if slices >= EMPTY_SLICES.look:
            yield _Finding("look", f"{name}, a condition, ends {slices} slices before the brain at the {end}")
        brightest = float(np.percentile(volume[brain], 99))
        reason = f"{name}, a condition: a few voxels are far brighter than the brain, which is dark for it"
        yield from _below(brightest, SQUEEZED, reason)


def _cut_off(mask: Mask) -> tuple[float, str]:
    """Largest cross-section at an edge of the volume, of the largest along that axis, and which edge."""
    found = []
    for axis, ends in enumerate(ENDS):
        areas = np.count_nonzero(mask, axis=tuple({0, 1, 2} - {axis}))
        found += [(float(areas[index] / areas.max()), end) for index, end in zip((0, -1), ends, strict=True)]
    return max(found, key=lambda item: item[0])


# Small things


def _box(mask: Mask) -> tuple[slice, slice, slice]:
    """The box around the brain with a voxel to spare on each side, where there is one."""
    sides = []
    for axis in range(3):
        occupied = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        sides.append(slice(max(0, int(occupied[0]) - 1), int(occupied[-1]) + 2))
    return sides[0], sides[1], sides[2]


def _eroded(mask: Mask) -> Mask:
    """The voxels all of whose six neighbours are inside; those at the edge of the volume are not."""
    inner = np.zeros_like(mask)
    middle = (slice(1, -1),) * 3
    inner[middle] = mask[middle]
    for axis in range(3):
        first, second = _neighbours(axis)
        inner[first] &= mask[second]
        inner[second] &= mask[first]
    return inner


def _neighbours(axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Indices of all voxels but the last along an axis, and of those beside them."""
    first = tuple(slice(None, -1) if other == axis else slice(None) for other in range(3))
    second = tuple(slice(1, None) if other == axis else slice(None) for other in range(3))
    return first, second


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
