"""One image that belongs to no case: read, written, and turned into the voxel order of another."""

from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel import orientations

from cwdm.arrays import Affine, Volume
from cwdm.errors import InputError
from cwdm.images.grids import check_same_grid
from cwdm.images.nifti import FileError, affine_of, is_oriented, load, write


class Image(NamedTuple):
    """A volume and where its voxels lie.

    Attributes:
        volume: (X, Y, Z) float32 in the units and the voxel order of the file.
        affine: (4, 4), voxel indices to mm.
        oriented: whether the header gives the affine. Without qform and sform it is a guess of nibabel's, and the
            volume is taken as stored like BraTS.
    """

    volume: Volume
    affine: Affine
    oriented: bool


def read_volume(path: Path) -> Volume:
    """Read one file on its own: (X, Y, Z) float32 in the voxel order of the file.

    Raises:
        InputError: it is damaged, or is not one 3D volume of real numbers.
    """
    try:
        return load(path)[0]
    except FileError as error:
        raise InputError(f"{path}: {error}") from error


def read_grid(path: Path) -> Image:
    """Read one file of finite numbers.

    Raises:
        InputError: it is damaged, is not one 3D volume of finite real numbers, or its affine is not invertible.
    """
    try:
        volume, header = load(path)
        if not np.isfinite(volume).all():
            raise FileError("holds NaN or infinity; replace them, with 0 outside the brain")
        return Image(volume, affine_of(header), is_oriented(header))
    except FileError as error:
        raise InputError(f"{path}: {error}") from error


def write_nifti(
    path: Path, voxels: npt.NDArray[np.generic], affine: Affine, description: str = "", oriented: bool = True
) -> None:
    """Write a volume that belongs to no case yet as .nii.gz, in the type it has; same input, same bytes.

    Args:
        path: the file; appears whole or not at all.
        voxels: (X, Y, Z) real numbers.
        affine: (4, 4), voxel indices to mm.
        description: for the header, at most 79 characters.
        oriented: False leaves open how the voxels lie in space.

    Raises:
        OutputError: the file cannot be written.
    """
    header = nib.Nifti1Header()
    header.set_data_shape(voxels.shape)
    header.set_qform(affine, code=int(oriented))
    header.set_sform(affine, code=int(oriented))
    header.set_xyzt_units("mm")
    header["descrip"] = description
    write(path, voxels, header)


def in_order_of(like: Image, image: Image, case: str, names: tuple[str, str]) -> Volume:
    """The volume of `image` with its axes permuted and reversed to the voxel order of `like`; a view.

    Where one of both does not say how its voxels lie, they are taken as stored alike.

    Args:
        names: of `like` and `image`, for messages.

    Raises:
        CaseError: the voxels of the two do not lie at the same places.
    """
    volume, affine = image.volume, like.affine
    if like.oriented and image.oriented:  # else one of the affines is a guess
        # Between voxel indices, so that equal grids stay as they are however obliquely they lie.
        change = orientations.io_orientation(np.linalg.inv(like.affine) @ image.affine)
        affine = image.affine @ orientations.inv_ornt_aff(change, volume.shape)
        volume = orientations.apply_orientation(volume, change)
    first, second = names
    check_same_grid(case, first, {first: like.volume, second: volume}, {first: like.affine, second: affine})
    return volume
