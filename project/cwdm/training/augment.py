"""Training images made worse in the ways in which real ones are, each contrast in its own.

A registration is a little off, slices are thick, coils and scanners differ: that befalls the images that are given,
one by one. Only what all images of a patient have in common, the mask and the side, befalls the target too.
"""

from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field

from cwdm.arrays import Mask, Volume
from cwdm.strict import Number, StrictSettings
from cwdm.training import distort
from cwdm.training.distort import Vector

MARGIN = 4
"""Voxels around what is trained on, from which images are moved in."""

PIECES = 5
"""Of the curve from one scanner's intensities to another's."""

Array = npt.NDArray[np.float32]


def _within(low: float, high: float) -> AfterValidator:
    """Check of a range in the settings."""

    def check(span: list[float]) -> list[float]:
        if not low <= span[0] <= span[1] <= high:
            raise ValueError(f"must be two numbers from {low:g} to {high:g}, the smaller one first")
        return span

    return AfterValidator(check)


Span = Annotated[list[Number], Field(min_length=2, max_length=2)]


class AugmentSettings(StrictSettings):
    """Ranges that augmentations are drawn from, evenly, a sample at a time; what has none does not happen.

    Attributes:
        probability: of each of them, for each given image by itself; of flips and `mask_mm` see there.
        rotation_deg: that an image is turned against the others, about any axis.
        shift_mm: that it is shifted, in any direction.
        slice_mm: thickness of its slices, along any axis, which are resampled back.
        bias: standard deviation of the logarithm of a smooth field that it is multiplied by.
        noise: standard deviation of Rician noise, as a share of the intensity that an image is scaled by: the 95th
            percentile of the brain with `data.intensities=brain`, else what becomes 1.
        gamma: exponent of the image as a share of this intensity, which stays.
        scanner: how unlike another scanner's scale of intensities is: standard deviation of the logarithm of the slope
            of its pieces.
        mask_mm: that the mask of all images is wider by, or narrower where negative, with the same probability.
        flips: axes along which all images are reversed, each in half of the samples: x left to right, y front to back,
            z upside down. `data.mirror` is another way to say x.
    """

    probability: Number = Field(default=0.5, ge=0, le=1)
    rotation_deg: Annotated[Span, _within(0, 30)] | None = None
    shift_mm: Annotated[Span, _within(0, 30)] | None = None
    slice_mm: Annotated[Span, _within(0, 20)] | None = None
    bias: Annotated[Span, _within(0, 2)] | None = None
    noise: Annotated[Span, _within(0, 1)] | None = None
    gamma: Annotated[Span, _within(0.1, 10)] | None = None
    scanner: Annotated[Span, _within(0, 2)] | None = None
    mask_mm: Annotated[Span, _within(-10, 10)] | None = None
    flips: list[Literal["x", "y", "z"]] = Field(default_factory=list, max_length=3)

    @property
    def happens(self) -> bool:
        """Whether there is anything to do."""
        return self != AugmentSettings(probability=self.probability)


def augment(
    voxels: Array,
    given: npt.NDArray[np.bool_],
    reference: npt.NDArray[np.float32],
    spacing_mm: Vector,
    settings: AugmentSettings,
    rng: np.random.Generator,
) -> Array:
    """Images of one patient, made worse.

    Args:
        voxels: (C, X, Y, Z), skull-stripped, with MARGIN voxels on every side, which are cut off.
        given: (C,), which of them the network is given; the others are what it should make.
        reference: (C,), the intensity of each that scales it, and that gamma and scanner leave as it is.
        spacing_mm: of the voxels, along X, Y and Z.
        rng: decides everything.
    """
    mask: Mask = np.any(voxels > 0, axis=0)
    wanted = _drawn_mask(mask, spacing_mm, settings, rng)
    old, before, after = _trimmed(voxels), _trimmed(mask), _trimmed(wanted)
    new = distort.filled(voxels, mask) if given.any() or wanted is not mask else voxels
    scales = np.where(reference > 0, reference, np.float32(1))
    result = []
    for k, own in enumerate(rng.spawn(len(voxels))):
        if given[k]:
            volume = scales[k] * _worse(np.maximum(new[k], 0) / scales[k], spacing_mm, settings, own)
        else:
            volume = _trimmed(new[k])
        # Beyond the end of a volume stands what becomes 0, which need not be 0.
        result.append(np.where(after, volume, np.where(before, np.float32(0), old[k])))
    axes = ["xyz".index(axis) for axis in sorted(set(settings.flips)) if rng.random() < 0.5]
    return distort.flipped(np.stack(result), axes)


def _worse(volume: Volume, spacing_mm: Vector, settings: AugmentSettings, rng: np.random.Generator) -> Volume:
    """One image in which the reference is 1 and the brain goes on beyond its mask, without its margin."""

    def drawn(span: list[float] | None, otherwise: float = 0.0) -> float:
        return rng.uniform(span[0], span[1]) if span and rng.random() < settings.probability else otherwise

    turn, shift = (drawn(span) * _direction(rng) for span in (settings.rotation_deg, settings.shift_mm))
    volume = distort.moved(volume, turn, shift, spacing_mm)
    axis = int(rng.integers(3))
    volume = _trimmed(distort.thick_slices(volume, axis, drawn(settings.slice_mm), spacing_mm[axis], rng.random()))
    volume = distort.rescaled(volume, drawn(settings.scanner) * rng.standard_normal(PIECES))
    volume = distort.with_gamma(volume, drawn(settings.gamma, 1.0))
    volume = distort.biased(volume, drawn(settings.bias), spacing_mm, rng)
    return distort.noisy(volume, drawn(settings.noise), rng)


def _drawn_mask(mask: Mask, spacing_mm: Vector, settings: AugmentSettings, rng: np.random.Generator) -> Mask:
    if settings.mask_mm is None or rng.random() >= settings.probability:
        return mask
    low, high = settings.mask_mm
    return distort.another_mask(mask, rng.uniform(low, high), spacing_mm, rng)


def _direction(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    vector = rng.standard_normal(3)
    return vector / np.linalg.norm(vector)


def _trimmed(volumes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    inside = slice(MARGIN, -MARGIN)
    return volumes[..., inside, inside, inside]
