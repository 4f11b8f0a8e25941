"""A synthetic patient whose images lie on grids of their own, and where they lie."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from cwdm.arrays import Mask
from cwdm.images import Image
from cwdm.phantoms import make_phantom
from cwdm.phantoms.variation import Variation
from cwdm.scans import Aligned, Head, align
from cwdm.scans.itk import RAS_LPS, Matrix, resample, resample_mask
from cwdm.scans.register import about

SPACING_MM = 4.0


class Patient(NamedTuple):
    """Attributes:
    heads: modality -> image and brain.
    movements: modality -> (4, 4), points of t1n to points of the image, LPS mm.
    """

    heads: Mapping[str, Head]
    movements: Mapping[str, Matrix]


def turn(axis: int, degrees: float) -> npt.NDArray[np.float64]:
    angle, matrix = np.radians(degrees), np.eye(3)
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def moved(head: Head, matrix: Matrix) -> Head:
    """The same voxels elsewhere: points of the old place to points of the new one."""
    return Head(head.image._replace(affine=RAS_LPS @ matrix @ RAS_LPS @ head.image.affine), head.mask)


def sliced(head: Head, thickness_mm: float) -> Head:
    """The same on slices of another thickness, with the first axis reversed: another grid and voxel order."""
    image, mask = head
    shape = (*image.volume.shape[:2], int(image.volume.shape[2] * SPACING_MM / thickness_mm))
    onto = image.affine.copy()
    onto[:3, 2] *= thickness_mm / SPACING_MM
    onto[:3, 3] += onto[:3, 0] * (shape[0] - 1)
    onto[:3, 0] *= -1
    volume = resample(image.volume, image.affine, shape, onto, np.eye(4))
    inside: Mask = resample_mask(mask, image.affine, shape, onto, np.eye(4))
    return Head(Image(np.where(inside, volume, np.float32(0)), onto, True), inside)


def make_patient(seed: int) -> Patient:
    phantom = make_phantom(seed, (48, 57, 45), SPACING_MM, Variation(misregistration_mm=(0.0, 0.0), thick_slice=0.0))
    whole = {
        modality: Head(Image(volume.astype(np.float32), phantom.affine, True), volume != 0)
        for modality, volume in phantom.volumes.items()
    }
    centre = np.array([90.0, -110.0, 90.0])
    movements = {"t1n": np.eye(4), "t2w": about(turn(0, 12), centre), "t2f": about(turn(2, -8), centre)}
    movements["t2w"][:3, 3] += [10, -15, 12]
    heads = {"t1n": whole["t1n"], "t2w": sliced(whole["t2w"], 6.0), "t2f": sliced(whole["t2f"], 5.0)}
    return Patient({name: moved(head, movements[name]) for name, head in heads.items()}, movements)


@pytest.fixture(scope="session")
def patient() -> Patient:
    return make_patient(11)


@pytest.fixture(scope="session")
def aligned(patient: Patient) -> Aligned:
    return align(patient.heads, "native")
