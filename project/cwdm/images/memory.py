"""A case whose volumes are in memory, as `read_case` makes one of files."""

from collections.abc import Mapping

import nibabel as nib
import numpy as np
import numpy.typing as npt

from cwdm.arrays import Affine, Volume
from cwdm.errors import CaseError
from cwdm.images import check_same_grid
from cwdm.images.cases import MODALITIES, Case, _background_warnings, _grid_warnings, nearest_of

NAME = "volumes in memory"
"""What messages call such a case."""


def case_of_arrays(volumes: Mapping[str, npt.ArrayLike], affine: Affine | None = None, target: str = "") -> Case:
    """The case of volumes in memory.

    Args:
        volumes: modality -> (X, Y, Z) intensities.
        affine: (4, 4), voxel indices to RAS mm; None leaves open how the voxels lie in space.
        target: the modality to be synthesised; may be left out where one alone is missing.

    Raises:
        CaseError: there is no modality of this name, none or several are missing and none is chosen, a volume is not
            one of finite real numbers (X, Y, Z), shapes differ, or the affine is not invertible.
    """
    if unknown := [name for name in (*volumes, *([target] if target else [])) if name not in MODALITIES]:
        raise CaseError(NAME, f"no modality is called {unknown[0]!r}; expected {', '.join(MODALITIES)}")
    missing = [name for name in MODALITIES if name not in volumes]
    if not target and len(missing) != 1:
        raise CaseError(NAME, f"expected exactly one missing modality or a target, found {len(missing)} missing")
    target = target or missing[0]
    given = {name: _volume(name, volumes[name]) for name in MODALITIES if name in volumes and name != target}
    if not given:
        raise CaseError(NAME, f"there is nothing to make {target} from; give at least one other modality")
    oriented = affine is not None
    placed = np.eye(4) if affine is None else np.asarray(affine, np.float64)
    if placed.shape != (4, 4) or not np.isfinite(placed).all() or np.linalg.matrix_rank(placed[:3, :3]) < 3:
        raise CaseError(NAME, "expected an affine (4, 4) that can be inverted, from voxel indices to mm")
    nearest = nearest_of(target, given)
    check_same_grid(NAME, nearest, given, dict.fromkeys(given, placed))
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape(given[nearest].shape)
    header.set_qform(placed, code=int(oriented))
    header.set_sform(placed, code=int(oriented))
    header.set_xyzt_units("mm")
    warnings = (*_grid_warnings(header, placed), *_background_warnings(given))
    return Case(NAME, target, given, placed, header, warnings)


def _volume(name: str, values: npt.ArrayLike) -> Volume:
    array = np.asarray(values)
    if array.ndim != 3 or not array.size or array.dtype.kind not in "biuf":
        raise CaseError(NAME, f"{name}: expected real numbers (X, Y, Z), found {array.dtype} of shape {array.shape}")
    volume = array.astype(np.float32)
    if bad := volume.size - np.count_nonzero(np.isfinite(volume)):
        raise CaseError(NAME, f"{name}: {bad} voxels are not finite numbers; replace them, with 0 outside the brain")
    return volume
