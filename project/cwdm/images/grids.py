"""Volumes whose voxels lie at the same places."""

import itertools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cwdm.arrays import Affine, Volume
from cwdm.errors import CaseError
from cwdm.images.nifti import by


def check_same_grid(case: str, nearest: str, volumes: Mapping[str, Volume], affines: Mapping[str, Affine]) -> None:
    """Volumes of one shape whose voxels lie at the same places; `nearest` is the one that the others are held to.

    Raises:
        CaseError: they do not.
    """
    if len({volume.shape for volume in volumes.values()}) > 1:
        found = ", ".join(f"{modality} {by(volume.shape)}" for modality, volume in volumes.items())
        raise CaseError(case, f"expected volumes of one shape, found {found}; resample them to one grid")
    # Half a voxel: less, and every voxel still lies nearest to its partner; rounding in headers moves corners
    # by micrometres, a wrong grid by voxels.
    corners = [(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in volumes[nearest].shape))]
    tolerance_mm = 0.5 * spacing_mm(affines[nearest]).min()
    for modality, affine in affines.items():
        shift_mm = np.linalg.norm((affine - affines[nearest]) @ np.transpose(corners), axis=0).max()
        if shift_mm > tolerance_mm:
            raise CaseError(
                case,
                f"expected volumes on one grid, found corners of {modality} and {nearest} {shift_mm:.3g} mm "
                "apart (affines differ); register or resample them to one grid",
            )


def spacing_mm(affine: Affine) -> npt.NDArray[np.float64]:
    """Edges of a voxel."""
    edges: npt.NDArray[np.float64] = np.linalg.norm(affine[:3, :3], axis=0)
    return edges
