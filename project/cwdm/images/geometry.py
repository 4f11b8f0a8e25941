"""Windows and voxel orders between files and network, each with its inverse."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import EllipsisType
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from nibabel import orientations

from cwdm.arrays import Affine, Mask, bounding_box

AnyType = TypeVar("AnyType", bound=np.generic)

MOST_WINDOW_VOXELS = 4 * 224 * 224 * 160
"""The network's memory grows with the window: beyond this, one case would take down a machine that can do the rest."""

ORIENTATION = "LPS"
"""Voxel order that the weights know: that of BraTS files."""

PUBLISHED_WINDOW = (224, 224, 160)
"""Voxels that the published weights see of the 240×240×155 of a BraTS volume."""


# Window


@dataclass(frozen=True)
class Window:
    """A box of voxels; where it reaches beyond the end of the volume there are zeros.

    Args:
        start: first voxel along each axis, >= 0.
        size: voxels along each axis.
        shape: of the volume that the window is cut from.
    """

    start: tuple[int, int, int]
    size: tuple[int, int, int]
    shape: tuple[int, int, int]

    def crop(self, volume: npt.NDArray[AnyType]) -> npt.NDArray[AnyType]:
        """Cut (..., X, Y, Z) of the volume's shape to the window's size, with zeros at the end where it is short."""
        assert volume.shape[-3:] == self.shape, (volume.shape, self.shape)
        inside = volume[self._index]
        missing = [(0, size - length) for size, length in zip(self.size, inside.shape[-3:], strict=True)]
        return np.pad(inside, [(0, 0)] * (volume.ndim - 3) + missing)

    def restore(self, volume: npt.NDArray[AnyType]) -> npt.NDArray[AnyType]:
        """Put (..., X, Y, Z) of the window's size back where it was cut, zeros around it."""
        assert volume.shape[-3:] == self.size, (volume.shape, self.size)
        whole = np.zeros((*volume.shape[:-3], *self.shape), volume.dtype)
        x, y, z = whole[self._index].shape[-3:]
        whole[self._index] = volume[..., :x, :y, :z]
        return whole

    @property
    def _index(self) -> tuple[EllipsisType | slice, ...]:
        return (..., *(slice(start, start + size) for start, size in zip(self.start, self.size, strict=True)))


def choose_window(
    brain_mask: Mask, multiple: int = 32, published: tuple[int, int, int] = PUBLISHED_WINDOW
) -> tuple[Window, tuple[str, ...]]:
    """The published window in the centre of the volume, or the nearest one that holds the whole brain.

    Args:
        brain_mask: (X, Y, Z).
        multiple: of voxels along each axis that the network can halve as often as it has to.
        published: size that the weights were trained on.

    Returns:
        The window, and what is unusual about it in plain words.

    Raises:
        ValueError: the brain needs a window of more than four times the published one's voxels.
    """
    starts, sizes, warnings = [], [], []
    for axis, (length, box) in enumerate(zip(brain_mask.shape, bounding_box(brain_mask), strict=True)):
        first, end = box.start, box.stop
        usual = min(_round_up(published[axis], multiple), _round_up(length, multiple))
        size = max(usual, _round_up(end - first, multiple))
        centred = max(0, (length - size) // 2)
        start = min(max(centred, end - size), first) if end else centred
        if size > usual:
            warnings.append(
                f"the brain spans {end - first} voxels along axis {axis + 1}, more than the usual window of {usual}: "
                f"the window grew to {size}, which the weights were not trained on"
            )
        elif start != centred:
            warnings.append(
                f"the brain reaches beyond the usual window along axis {axis + 1}: "
                f"the window moved by {start - centred:+d} voxels"
            )
        starts.append(start)
        sizes.append(size)
    _check_size(sizes)
    return Window(_three(starts), _three(sizes), _three(brain_mask.shape)), tuple(warnings)


def tight_window(brain_mask: Mask, multiple: int, least: tuple[int, int, int] = (0, 0, 0)) -> Window:
    """The smallest window that holds the brain, of sizes that are multiples of `multiple` and at least `least`.

    Raises:
        ValueError: the brain needs a window of more than four times the published one's voxels.
    """
    starts, sizes = [], []
    for axis, (length, box) in enumerate(zip(brain_mask.shape, bounding_box(brain_mask), strict=True)):
        first, end = box.start, box.stop
        size = max(_round_up(end - first, multiple), _round_up(least[axis], multiple), multiple)
        sizes.append(size)
        starts.append(max(0, min((first + end - size) // 2, length - size)))
    _check_size(sizes)
    return Window(_three(starts), _three(sizes), _three(brain_mask.shape))


def _check_size(sizes: list[int]) -> None:
    if math.prod(sizes) > MOST_WINDOW_VOXELS:
        raise ValueError(f"the brain needs a window of {sizes} voxels, too many to compute; resample the case to 1 mm")


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _three(numbers: Iterable[int]) -> tuple[int, int, int]:
    x, y, z = numbers
    return x, y, z


# Orientation


@dataclass(frozen=True)
class Orientation:
    """A change of voxel order: permuted and reversed axes.

    Args:
        axes: which old axis each new axis is.
        flips: which new axes run the other way.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    @classmethod
    def identity(cls) -> "Orientation":
        """No change."""
        return cls((0, 1, 2), (False, False, False))

    @classmethod
    def to(cls, code: str, affine: Affine) -> "Orientation":
        """From the voxel order that an affine (4, 4) describes to the one with a code.

        Args:
            code: directions in which the indices grow, as nibabel writes them: "LPS" runs to the left, to the
                back and upwards.
            affine: voxel indices to mm; an oblique one counts as the closest of the 48 orders.
        """
        now = orientations.io_orientation(affine)
        change = orientations.ornt_transform(now, orientations.axcodes2ornt(tuple(code)))
        # Row i says where old axis i goes.
        axes = np.argsort(change[:, 0])
        flips = change[axes, 1] < 0
        return cls(_three(int(axis) for axis in axes), (bool(flips[0]), bool(flips[1]), bool(flips[2])))

    def apply(self, volume: npt.NDArray[AnyType]) -> npt.NDArray[AnyType]:
        """Bring (X, Y, Z) into the new order; a view."""
        return np.flip(volume.transpose(self.axes), self._flipped)

    def invert(self, volume: npt.NDArray[AnyType]) -> npt.NDArray[AnyType]:
        """Bring a volume in the new order back into the old one; a view."""
        return np.flip(volume, self._flipped).transpose(np.argsort(self.axes))

    @property
    def _flipped(self) -> tuple[int, ...]:
        return tuple(axis for axis, flip in enumerate(self.flips) if flip)


def to_lps(affine: Affine, oriented: bool) -> Orientation:
    """From a file's voxel order to the network's, LPS; a file that does not say its own counts as stored like BraTS."""
    return Orientation.to(ORIENTATION, affine) if oriented else Orientation.identity()
