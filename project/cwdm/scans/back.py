"""What was made in a space, brought back onto the grid of one of the patient's own images."""

from pathlib import Path

import numpy as np

from cwdm.arrays import Mask, Volume
from cwdm.files import output_errors
from cwdm.images import Image
from cwdm.scans.align import Aligned
from cwdm.scans.itk import inverse_of, resample, resample_mask, write_transform


def bring_back(volume: Volume, aligned: Aligned, modality: str = "", mask: Mask | None = None) -> Image:
    """A volume of the space on the grid of one image, by one interpolation through the inverse movement.

    Args:
        volume: (X, Y, Z) in the space, in any units; what is outside the brain does not matter.
        aligned: how the patient's images came into the space.
        modality: of the image whose grid is filled; empty: the reference.
        mask: where the volume is of use, (X, Y, Z) in the space; None: the brain as far as every image reaches.

    Returns:
        0 wherever the mask does not reach.
    """
    modality = modality or aligned.reference
    like, inverse = aligned.heads[modality].image, inverse_of(aligned.matrices[modality])
    mask = aligned.brain & aligned.covered if mask is None else mask
    grid = like.volume.shape, like.affine
    moved = resample(volume, aligned.space.affine, *grid, inverse)
    inside = resample_mask(mask, aligned.space.affine, *grid, inverse)
    return Image(np.where(inside, moved, np.float32(0)), like.affine, True)


def write_transforms(aligned: Aligned, folder: Path, name: str) -> list[Path]:
    """Write ITK text files `<name>_from-<space>_to-<modality>.txt` and the inverse ones; returns them.

    Each takes points in LPS mm from the first to the second, so it is the one with which an image of the second is
    resampled onto the grid of the first.

    Raises:
        OutputError: the folder cannot be written to.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for modality, matrix in aligned.matrices.items():
        space = aligned.space.name
        written[folder / f"{name}_from-{space}_to-{modality}.txt"] = matrix
        written[folder / f"{name}_from-{modality}_to-{space}.txt"] = inverse_of(matrix)
    for path, matrix in written.items():
        write_transform(path, matrix)
    return list(written)
