"""Contrasts of one patient brought into one space, each interpolated once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cwdm.arrays import Mask, Volume
from cwdm.errors import CaseError
from cwdm.images import Image
from cwdm.scans.itk import Matrix, ShearError, covered, resample, resample_mask
from cwdm.scans.register import Brain, Registration, prepare, register
from cwdm.scans.spaces import Space, find_space

_WHOLE = 0.8
"""Brain that an image must show, of the image that shows most, for the others to be registered to it."""

_PREFERRED = ("t1c", "t1n", "t2f", "t2w")
"""Of images that are resolved alike; the atlases are T1-weighted."""


class Head(NamedTuple):
    """One image of a patient on its own grid, and the brain in it."""

    image: Image
    mask: Mask

    @property
    def brain_ml(self) -> float:
        """Volume of the brain."""
        return float(np.count_nonzero(self.mask) * abs(np.linalg.det(self.image.affine[:3, :3])) / 1000)


@dataclass(frozen=True)
class Aligned:
    """One patient's images in one space.

    Attributes:
        space: where they are.
        reference: the modality that the others were registered to.
        heads: modality -> the image on its own grid.
        matrices: modality -> (4, 4), points of the space to points of the image, LPS mm.
        registrations: modality -> of each image to the reference; that of the reference is to the atlas, and is missing
            in the space `native`.
        brains: modality -> the image as the measure of registration sees it.
        brain: (X, Y, Z) in the space: what most of the masks that reach there call brain.
        covered: (X, Y, Z): where every image reaches.
    """

    space: Space
    reference: str
    heads: Mapping[str, Head]
    matrices: Mapping[str, Matrix]
    registrations: Mapping[str, Registration]
    brains: Mapping[str, Brain]
    brain: Mask
    covered: Mask

    def volume(self, modality: str) -> Volume:
        """(X, Y, Z) of one image in the space, interpolated once, 0 outside the brain."""
        image = self.heads[modality].image
        moved = resample(image.volume, image.affine, self.space.shape, self.space.affine, self.matrices[modality])
        return np.where(self.brain, moved, np.float32(0))

    def mask(self, modality: str) -> Mask:
        """(X, Y, Z) of one image's own brain mask in the space."""
        image, mask = self.heads[modality]
        return resample_mask(mask, image.affine, self.space.shape, self.space.affine, self.matrices[modality])


def align(heads: Mapping[str, Head], space: str = "sri24", reference: str = "", name: str = "scan") -> Aligned:
    """Register each image rigidly to the best-resolved one, and that one to the space.

    Args:
        heads: modality -> image with its brain mask, see `strip`.
        space: see `Space`.
        reference: modality to register to; empty: the best-resolved one that shows the whole brain.
        name: of the patient, for messages.

    Raises:
        CaseError: there is no image, an image has no orientation or axes that are not at right angles.
        SettingsError: there is no such space.
    """
    reference = reference or best_resolved(heads, name)
    if reference not in heads:
        raise CaseError(name, f"the space was to be that of {reference}, which is not there")
    grid = find_space(space, heads[reference].image)
    brains = {modality: _prepared(head, f"{name}, {modality}") for modality, head in heads.items()}
    registrations = {
        modality: register(brains[reference], brain) for modality, brain in brains.items() if modality != reference
    }
    matrices = {modality: found.matrix for modality, found in registrations.items()} | {reference: np.eye(4)}
    if grid.atlas is not None:
        registrations[reference] = register(grid.atlas, brains[reference])
        to_reference = registrations[reference].matrix
        matrices = {modality: matrix @ to_reference for modality, matrix in matrices.items()}
    return compose(grid, reference, heads, matrices, brains, registrations)


def compose(
    space: Space,
    reference: str,
    heads: Mapping[str, Head],
    matrices: Mapping[str, Matrix],
    brains: Mapping[str, Brain],
    registrations: Mapping[str, Registration],
) -> Aligned:
    """Images whose way into a space is known; see `Aligned`."""
    votes, reached = np.zeros((2, *space.shape), np.int8)
    for modality, (image, mask) in heads.items():
        votes += resample_mask(mask, image.affine, space.shape, space.affine, matrices[modality])
        reached += covered(image, space.shape, space.affine, matrices[modality])
    brain = (2 * votes >= reached) & (votes > 0)
    return Aligned(space, reference, heads, matrices, registrations, brains, brain, reached == len(heads))


def best_resolved(heads: Mapping[str, Head], name: str = "scan") -> str:
    """The modality with the thinnest slices, then the smallest voxels, of those that show the whole brain.

    Raises:
        CaseError: there is no image.
    """
    if not heads:
        raise CaseError(name, "there is no image")
    most = max(head.brain_ml for head in heads.values())

    def rank(modality: str) -> tuple[float, float, int]:
        spacing = np.linalg.norm(heads[modality].image.affine[:3, :3], axis=0)
        preferred = _PREFERRED.index(modality) if modality in _PREFERRED else len(_PREFERRED)
        return round(float(spacing.max()), 1), round(float(spacing.prod()), 2), preferred

    return min((modality for modality, head in heads.items() if head.brain_ml >= _WHOLE * most), key=rank)


def _prepared(head: Head, name: str) -> Brain:
    if not head.image.oriented:
        raise CaseError(name, "the header does not say how the head lies (qform and sform codes are 0); repair it")
    if not head.mask.any():
        raise CaseError(name, "the brain mask is empty; check that it belongs to this image")
    try:
        return prepare(head.image, head.mask)
    except ShearError as error:
        raise CaseError(name, str(error)) from error
