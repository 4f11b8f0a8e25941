"""NIfTI files and their sidecars as scans: read, and checked for what no scan is."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cwdm.arrays import Affine, Volume
from cwdm.errors import CaseError, InputError
from cwdm.files import read_json
from cwdm.images import Image, read_grid

FEWEST_SLICES = 8
FEWEST_VALUES = 16
MOST_NEGATIVE = 0.05
MOST_SHEAR = np.sin(np.radians(0.5))
_MOST_SIDECAR = 4 << 20
_EXTENT_MM = 40.0, 600.0

RAS_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From RAS mm, as in NIfTI, to LPS mm, as in DICOM and ITK, and back."""


def read_scan(patient: str, source: str, path: Path) -> Image:
    """The image in a file, if it can be a scan of a head.

    Raises:
        CaseError: it cannot.
    """
    try:
        image = read_grid(path)
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise CaseError(patient, f"{source}: {reason}") from error
    if problem := _problem(image):
        raise CaseError(patient, f"{source}: {problem}")
    return image


def digest(image: Image) -> str:
    """The same for images of the same voxels, whatever their files are called or packed."""
    voxels = np.ascontiguousarray(image.volume.transpose())
    return hashlib.sha256(voxels.tobytes() + np.round(image.affine, 3).tobytes()).hexdigest()


def read_sidecar(path: Path) -> dict[str, Any]:
    """What the JSON file says; nothing where it is none."""
    try:
        fields = read_json(path, _MOST_SIDECAR)
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def fields_beside(path: Path) -> Mapping[str, Any]:
    """What the sidecar of a NIfTI file says."""
    return read_sidecar(path.with_name(stem(path.name) + ".json"))


def stem(name: str) -> str:
    """A file's name without .nii or .nii.gz."""
    lower = name.lower()
    return name[: -len(".nii.gz")] if lower.endswith(".nii.gz") else name[: -len(".nii")]


def _problem(image: Image) -> str:
    if not image.oriented:
        return "its header does not say how the head lies (no qform, no sform); convert it again from DICOM"
    return _problem_of_grid(image.volume.shape, image.affine) or _problem_of_values(image.volume)


def _problem_of_grid(shape: tuple[int, ...], affine: Affine) -> str:
    edges_mm = np.linalg.norm(affine[:3, :3], axis=0)
    extents_mm = np.array(shape) * edges_mm
    low, high = _EXTENT_MM
    if min(shape) < FEWEST_SLICES:
        return f"only {min(shape)} slices, expected at least {FEWEST_SLICES}"
    if not (extents_mm.min() >= low and extents_mm.max() <= high):
        found = "×".join(f"{mm:.4g}" for mm in extents_mm)
        return f"{found} mm are no head, expected {low:g} to {high:g} mm along each axis; check the header"
    axes = affine[:3, :3] / edges_mm
    cosines = np.abs(axes.T @ axes - np.eye(3))
    if cosines.max() > MOST_SHEAR:
        lean = np.degrees(np.arcsin(min(1.0, float(cosines.max()))))
        return f"its axes lean by {lean:.1f} degrees, as of a tilted gantry; resample it to right angles"
    return ""


def _problem_of_values(volume: Volume) -> str:
    sample = volume.reshape(-1, order="A")[:: max(1, volume.size // 200_000)]
    values = np.unique(sample)
    if values.size < FEWEST_VALUES:
        return f"only {values.size} different values, as of a mask; expected intensities"
    negative = float((sample < 0).mean())
    if negative > MOST_NEGATIVE:
        return (
            f"{negative:.0%} of its voxels are negative, so it holds no magnitudes (a phase image, a difference, or "
            "normalised values); give the image as the scanner made it"
        )
    return ""
