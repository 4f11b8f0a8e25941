"""What sequences measure, estimated from the contrasts of a patient: proton density, T1 and T2, and T1 after the agent.

The signal equations of `physics` are inverted voxel by voxel. Three images do not determine three properties while
the scanner's gain, coil and timings are unknown too; this is how they are held:

- Gain and timings of a contrast, by the modes of its white matter, grey matter and CSF, which are found by clustering
  and taken to have the relaxation times of the literature (`TISSUES`): of the timings in use those are believed whose
  ratios of the three come closest, and a rising line through the three takes away what is left. So T1 and T2 are
  right for these tissues whatever the patient's own are, and of others relative to them: within 10 % in deep grey
  matter of most phantoms, but off by a factor of two and more in some tumours (necrosis, contrast agent), as T1 and
  T2 far from the three hang on the timings.
- The coil's bias, by what varies slowly within white and grey matter. Slow differences of the tissue itself are lost.
- Proton density, by T1: both follow from the water content (P. P. Fatouros, A. Marmarou, J Neurosurg 90:109, 1999).
  A prior of 5 % holds it there; wider ones hold T2 and T1.
- T1 beyond that of CSF, at which FLAIR is nulled and its magnitude would rise again, by a bound.
- What the equations do not explain, such as flow, noise and tissues that share a voxel in one image and not in
  another, which is misaligned or has thicker slices, stays in `Maps.unexplained`, and new images of a contrast inherit
  it in the measure in which their CSF and white matter differ.

The priors decide wherever an image says little, as of T2 in CSF.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.cluster.vq import kmeans2

from cwdm.arrays import Mask, Volume, block_means
from cwdm.phantoms.grids import Floats
from cwdm.phantoms.physics import TISSUES, Timing, nulling_time, shortened_t1

ANCHORS = ("csf", "grey", "white")
NEEDED = ("t1n", "t2w", "t2f")
"""Contrasts without which there is nothing to invert; t1c may be there as well."""

NOISE = 0.03
"""Of the signals, as a share of that of white matter."""

PRIOR_STD = np.array([0.8, 0.5, 0.05], np.float32)
"""Of the logarithms of T1, T2 and proton density, about what `_typical` says."""

BOUNDS = np.log(np.array([[250, TISSUES["csf"].t1], [20, TISSUES["csf"].t2], [0.3, 1.1]], np.float32))
"""Of the same."""

QUIET, NOISE_WEIGHT = 0.05, 3
"""Share of the brain whose surroundings vary by noise alone; and how many times as large a variance is taken for it."""

STEPS, LONGEST_STEP = 8, 0.4
PART = 1 << 17
"""Voxels that are computed at once."""

BIAS_MM, BLOCK = 25.0, 4

TOLERANCES = (0.5, 0.35, 0.25, 0.2)
"""Of the logarithm, by which tissue that shows the coil's bias may differ from its kind, the better this is known."""


@dataclass(frozen=True)
class Maps:
    """What was found in a patient, at the voxels of the mask, (V,) each.

    Attributes:
        mask: (X, Y, Z), the brain.
        pd: proton density relative to water.
        t1, t2: in ms.
        t1_enhanced: T1 after contrast agent in ms; None where there was no such image.
        timings: of each contrast, as they were believed.
        gains: of each contrast, what one unit of signal is in the numbers of its file.
        bias: of each contrast, the factor by which its coil varies, 1 on average.
        unexplained: of each contrast, the signal that the equations do not explain.
    """

    mask: Mask
    pd: Floats
    t1: Floats
    t2: Floats
    t1_enhanced: Floats | None
    timings: dict[str, Timing]
    gains: dict[str, float]
    bias: dict[str, Floats]
    unexplained: dict[str, Floats]

    def signal(self, contrast: str, timing: Timing) -> Floats:
        """Signal of a contrast with a timing, without gain and bias."""
        inherited = np.float32(_difference(contrast, timing) / _difference(contrast, self.timings[contrast]))
        signal = self.explained(contrast, timing) + inherited * self.unexplained[contrast]
        return np.maximum(signal, 0)

    def explained(self, contrast: str, timing: Timing) -> Floats:
        """What the equations say of it."""
        t1 = self.t1_enhanced if contrast == "t1c" and self.t1_enhanced is not None else self.t1
        return np.maximum(timing.signal(self.pd, t1, self.t2), 0)

    def stretched(self, t1: float, t2: float) -> "Maps":
        """The same patient with all relaxation times multiplied, as at another field strength."""
        enhanced = None if self.t1_enhanced is None else self.t1_enhanced * np.float32(t1)
        return replace(self, t1=self.t1 * np.float32(t1), t2=self.t2 * np.float32(t2), t1_enhanced=enhanced)


def estimate(volumes: Mapping[str, Volume], spacing_mm: Sequence[float]) -> Maps:
    """The maps of a patient.

    Args:
        volumes: t1n, t2w, t2f and, if there is one, t1c, skull-stripped, (X, Y, Z) each.
        spacing_mm: of the voxels.

    Raises:
        ValueError: a contrast is missing, or no three tissues are found.
    """
    if lacking := [name for name in NEEDED if name not in volumes]:
        raise ValueError(f"{', '.join(lacking)} missing; relaxation times follow from {', '.join(NEEDED)} together")
    mask: Mask = np.any([volume > 0 for volume in volumes.values()], axis=0)
    flat, bias, modes = _without_bias({name: np.maximum(v, 0) for name, v in volumes.items()}, mask, spacing_mm)
    timings = {name: _timing_of(name, modes[name]) for name in flat}
    gains = {name: modes[name][2] / _expected(name, timing)[2] for name, timing in timings.items()}
    signals = {
        name: _to_signal(values, modes[name], _expected(name, timings[name]), gains[name])
        for name, values in flat.items()
    }
    quiet = {name: without_noise(values, mask) for name, values in signals.items()}
    t1, t2, pd = np.exp(_in_parts(lambda part: _inverted(part, timings), {name: quiet[name] for name in NEEDED}))
    enhanced = _enhanced_t1(quiet["t1c"], pd, t2, timings["t1c"]) if "t1c" in quiet else None
    maps = Maps(mask, pd, t1, t2, enhanced, timings, gains, bias, signals)
    return replace(maps, unexplained={name: signals[name] - maps.explained(name, t) for name, t in timings.items()})


# Modes of the tissues, and bias


def _without_bias(
    volumes: Mapping[str, Volume], mask: Mask, spacing_mm: Sequence[float]
) -> tuple[dict[str, Floats], dict[str, Floats], dict[str, Floats]]:
    """Of each contrast: values (V,) without its bias, the bias (V,), and the values of ANCHORS (3,)."""
    raw = {name: volume[mask] for name, volume in volumes.items()}
    bias = {name: np.ones(len(values), np.float32) for name, values in raw.items()}
    for tolerance in TOLERANCES:
        flat = {name: raw[name] / bias[name] for name in raw}
        tissue = _tissues(flat)
        deviations = {}
        for name, values in flat.items():
            medians = np.array([np.median(values[tissue == k]) for k in range(len(ANCHORS))], np.float32)
            deviations[name] = np.log(np.maximum(values, 1e-6) / np.maximum(medians[tissue], 1e-6))
        # Lesions deviate in one contrast or another.
        solid = (tissue > 0) & np.all([abs(one) < tolerance for one in deviations.values()], axis=0)
        for name, one in deviations.items():
            bias[name] = bias[name] * np.exp(_smoothed(np.where(solid, one, 0), solid, mask, spacing_mm))
    flat = {name: raw[name] / bias[name] for name in raw}
    return flat, bias, _modes(flat, _tissues(flat), mask)


def _tissues(flat: Mapping[str, Floats]) -> npt.NDArray[np.int32]:
    """Which of ANCHORS each voxel is nearest to, by t1n, t2w and t2f."""
    features, first = [], []
    for name, places in (("t1n", (0.05, 0.4, 0.8)), ("t2w", (0.95, 0.55, 0.25)), ("t2f", (0.04, 0.65, 0.45))):
        low, high = np.quantile(flat[name][::16], (0.02, 0.98))
        features.append(np.clip((flat[name] - low) / max(high - low, 1e-6), -0.2, 1.2))
        first.append(np.quantile(features[-1][::16], places))
    points = np.stack(features, axis=1)
    weights = np.array([1.0, 1.0, 0.5])  # lesions are what FLAIR shows best, and are none of the three
    centres, _ = kmeans2(points[::7] * weights, np.stack(first, axis=1) * weights, iter=20, minit="matrix")
    distances = np.stack([((points * weights - centre) ** 2).sum(1) for centre in centres])
    tissue: npt.NDArray[np.int32] = distances.argmin(0).astype(np.int32)
    return tissue


def _modes(flat: Mapping[str, Floats], tissue: npt.NDArray[np.int32], mask: Mask) -> dict[str, Floats]:
    """What each contrast shows in the depth of each of ANCHORS, where no other tissue is in the voxels, (3,)."""
    volume = np.full(mask.shape, -1, np.int32)
    volume[mask] = tissue
    pure = [ndimage.binary_erosion(volume == k)[mask] for k in range(len(ANCHORS))]
    pure = [deep if deep.sum() > 200 else tissue == k for k, deep in enumerate(pure)]
    if min(inside.sum() for inside in pure) == 0:
        raise ValueError("white matter, grey matter and CSF cannot be told apart; check that the images are aligned")
    return {name: np.array([np.median(values[inside]) for inside in pure], np.float32) for name, values in flat.items()}


def _smoothed(values: Floats, where: Mask, mask: Mask, spacing_mm: Sequence[float]) -> Floats:
    """Mean of the values (V,) around each voxel, of those where they are known; 0 on average."""

    def blurred(part: npt.NDArray[np.generic]) -> Floats:
        volume = np.zeros([-(-n // BLOCK) * BLOCK for n in mask.shape], np.float32)
        volume[tuple(slice(n) for n in mask.shape)][mask] = part
        width = [BIAS_MM / BLOCK / mm for mm in spacing_mm]
        return ndimage.gaussian_filter(block_means(volume, BLOCK), width)

    coarse = blurred(values * where) / np.maximum(blurred(where), 1e-3)
    places = (np.argwhere(mask).T - (BLOCK - 1) / 2) / BLOCK
    field: Floats = ndimage.map_coordinates(coarse, places, order=1, mode="nearest")
    return field - field.mean()


# Gain and timings


def _timing_of(contrast: str, modes: Floats) -> Timing:
    """Of the timings in use, the one in which the tissues differ as they do in an image."""

    def misfit(timing: Timing) -> float:
        expected = np.maximum(_expected(contrast, timing), 0.01)
        found = np.maximum(modes / modes[2] * expected[2], 0.01)
        return float(np.abs(np.log(found / expected)).sum())

    return min(_timings(contrast), key=misfit)


def _timings(contrast: str) -> list[Timing]:
    if contrast == "t2w":
        return [Timing(tr, te) for tr in (4500.0, 6000.0, 8000.0) for te in np.linspace(75, 125, 11).tolist()]
    if contrast == "t2f":
        nulling = nulling_time(TISSUES["csf"].t1, 9000)
        return [Timing(9000.0, te, nulling) for te in np.linspace(90, 135, 10).tolist()]
    spin_echo = [Timing(tr, 12.0) for tr in np.linspace(400, 950, 12).tolist()]
    return spin_echo + [Timing(2100.0, 3.5, ti) for ti in np.linspace(800, 1100, 13).tolist()]


def _expected(contrast: str, timing: Timing) -> Floats:
    """Signals of ANCHORS, (3,); what the agent does to them is part of what holds the gain."""
    tissues = [TISSUES[name] for name in ANCHORS]
    pd, t1, t2 = (np.array([getattr(tissue, key) for tissue in tissues], np.float32) for key in ("pd", "t1", "t2"))
    if contrast == "t1c":
        t1 = shortened_t1(t1, np.array([tissue.gd for tissue in tissues], np.float32))
    return np.maximum(timing.signal(pd, t1, t2), 0)


def _difference(contrast: str, timing: Timing) -> float:
    """Of CSF and white matter."""
    csf, _, white = _expected(contrast, timing)
    return float(abs(white - csf))


def _to_signal(values: Floats, modes: Floats, expected: Floats, gain: float) -> Floats:
    """Signals (V,) of values, by a rising line through the modes of the tissues; above them by the gain alone."""
    order = np.argsort(expected)
    found, wanted = modes[order] / gain, expected[order]
    if (np.diff(found) < 0.03 * found[-1]).any():  # grey and white matter alike, or the other way round
        found, wanted = (np.array([v[order == 0][0], v[order > 0].mean()]) for v in (found, wanted))
        found, wanted = np.sort(found), np.sort(wanted)
    knots, signals = np.r_[0, found], np.r_[0, wanted]
    scaled = values / np.float32(gain)
    inside = np.interp(scaled, knots, signals).astype(np.float32)
    return inside + np.maximum(scaled - np.float32(found[-1]), 0) * np.float32(signals[-1] / knots[-1])


def without_noise(signal: Floats, mask: Mask) -> Floats:
    """A signal (V,) without most of its noise, of which a weakly weighted image, imaged anew, would be full.

    What a line through the neighbours' values at each voxel says, flat where they differ no more than by noise, so that
    borders stay: the guided filter (K. He, J. Sun, X. Tang, IEEE T Pattern Anal 35:1397, 2013), guided by itself.
    """

    def mean(values: Floats) -> Floats:
        volume = np.zeros(mask.shape, np.float32)
        volume[mask] = values
        return ndimage.uniform_filter(volume, 3, mode="constant")[mask] / share

    share = ndimage.uniform_filter(mask.astype(np.float32), 3, mode="constant")[mask]
    local = mean(signal)
    variance = np.maximum(mean(signal**2) - local**2, 0)
    noise = np.quantile(variance, QUIET)
    slope = variance / (variance + NOISE_WEIGHT * noise + np.float32(1e-12))
    return mean(slope) * signal + mean(local - slope * local)


# Inversion


def _inverted(signals: Mapping[str, Floats], timings: Mapping[str, Timing]) -> Floats:
    """Logarithms of T1, T2 and proton density, (3, V): the most likely ones, by Gauss and Newton's method."""

    def misfits(theta: Floats) -> Floats:
        t1, t2, pd = np.exp(theta)
        fits = [(timings[name].signal(pd, t1, t2) - signals[name]) / level[name] for name in NEEDED]
        return np.stack([*fits, *((theta - _typical(theta[0])) / PRIOR_STD[:, None])])

    level = {
        name: np.float32(NOISE) * (signals[name] + np.float32(_expected(name, timings[name])[2])) for name in NEEDED
    }
    first = np.log(_t1_of(signals["t1n"], timings["t1n"]))
    theta = np.stack([first, *_typical(first)[1:]])
    step = np.float32(0.01)
    for _ in range(STEPS):
        now = misfits(theta)
        slopes = np.stack(
            [(misfits(theta + step * unit[:, None]) - now) / step for unit in np.eye(3, dtype=np.float32)]
        )
        normal = np.einsum("imv,jmv->vij", slopes, slopes)
        change = np.linalg.solve(normal, -np.einsum("imv,mv->vi", slopes, now)[..., None])[..., 0].T
        theta = theta + np.clip(change, -LONGEST_STEP, LONGEST_STEP)
        theta = np.clip(theta, BOUNDS[:, :1], BOUNDS[:, 1:])
    return theta


def _typical(log_t1: Floats) -> Floats:
    """Logarithms of T1, T2 and proton density, (3, V), as tissues have them: more water, more of each."""
    tissues = [TISSUES[name] for name in ("white", "grey", "oedema", "necrosis", "csf")]
    knots = np.log([tissue.t1 for tissue in tissues])
    curves = [np.interp(log_t1, knots, np.log([getattr(t, key) for t in tissues])) for key in ("t2", "pd")]
    return np.stack([np.full_like(log_t1, np.log(1200)), *curves]).astype(np.float32)


def _t1_of(signal: Floats, timing: Timing) -> Floats:
    """T1 in ms of a signal, if all else is as T1 lets expect."""
    t1 = np.geomspace(400, TISSUES["csf"].t1, 200).astype(np.float32)
    _, t2, pd = np.exp(_typical(np.log(t1)))
    expected = timing.signal(pd, t1, t2)
    return np.interp(signal, np.maximum.accumulate(expected[::-1]), t1[::-1]).astype(np.float32)


def _enhanced_t1(signal: Floats, pd: Floats, t2: Floats, timing: Timing) -> Floats:
    """T1 in ms that makes this signal of what is known of proton density and T2."""
    t1 = np.geomspace(60, TISSUES["csf"].t1, 400).astype(np.float32)
    one = np.ones_like(t1)
    recovered = timing.signal(one, t1, one * np.float32(1e9))
    wanted = signal / (pd * np.exp(-np.float32(timing.te) / t2))
    return np.interp(wanted, recovered[::-1], t1[::-1]).astype(np.float32)


def _in_parts(work: Callable[[Mapping[str, Floats]], Floats], values: Mapping[str, Floats]) -> Floats:
    """Results (C, V) of values (V,) that are looked at one by one, some at a time, as all need too much memory."""
    voxels = len(next(iter(values.values())))
    parts = (slice(first, first + PART) for first in range(0, voxels, PART))
    return np.concatenate([work({name: v[part] for name, v in values.items()}) for part in parts], axis=1)
