"""LIDC-IDRI and other CT from DICOM to what WDM is trained on: 1 mm, 256³ around the centre, [0, 1]."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from scipy import ndimage

from cwdm.arrays import Volume
from cwdm.errors import CaseError, InputError
from cwdm.files import check_apart, check_writable, files_below, is_folder, remove_stale
from cwdm.images import centre, is_made, write_nifti
from cwdm.runner import Outcome, run_each

AIR_HU = -1000.0
UPPER_QUANTILE = 0.999
SIZE = 256
FEWEST_SLICES = 8
MOST_VOXELS = 1024**3

MARK = "CT, [0, 1]"
"""How the description of a prepared scan begins."""

LAS = np.diag([-1.0, 1.0, 1.0, 1.0])
"""Affine of the volumes: they run to the left, to the front and upwards, as WDM's converter from DICOM stores them."""


class Prepared(NamedTuple):
    """A scan as WDM is trained on it.

    Attributes:
        volume: (256, 256, 256) in [0, 1].
        limits_hu: what became 0 and 1.
        scanned: voxels of it that come from the scan, in the middle; the others are padding.
    """

    volume: Volume
    limits_hu: tuple[float, float]
    scanned: tuple[int, ...]

    @property
    def description(self) -> str:
        """What was done, for the header of the file."""
        low, high = self.limits_hu
        padded = f", padded from {'x'.join(map(str, self.scanned))}" if min(self.scanned) < SIZE else ""
        return f"{MARK} is {low:.0f} to {high:.0f} HU{padded}"


def prepare_lidc(source: Path, out: Path, on_case: Callable[[str], None] = lambda line: None) -> list[Outcome]:
    """Write OUT/<patient>-<series>.nii.gz for every CT series below a folder of DICOM files; finished ones stay.

    Args:
        on_case: told what became of each series, in words.

    Raises:
        InputError: there is no CT series.
        OutputError: the output cannot be written.
    """
    check_apart(out, source)
    series = find_series(source)
    check_writable(out)
    remove_stale(out)

    def write(name: str) -> None:
        prepared = prepare(name, *read_series(name, series[name]))
        write_nifti(out / f"{name}.nii.gz", prepared.volume, LAS, prepared.description)
        on_case(f"{name}: written; {prepared.description}")

    def tell(outcome: Outcome) -> None:
        if outcome.status != "written":
            on_case(outcome.line)

    return run_each(
        series, write, name=str, is_finished=lambda name: is_made(out / f"{name}.nii.gz", MARK), on_outcome=tell
    )


def find_series(source: Path) -> dict[str, list[Path]]:
    """Name -> files of every CT series below `source`; the name is the patient's and a digest of the series' number.

    Raises:
        InputError: there is none.
    """
    if not is_folder(source):
        raise InputError(f"the DICOM folder {source} does not exist; check the path")
    series: dict[str, list[Path]] = defaultdict(list)
    for path in files_below(source):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
            modality, uid, patient = header.get("Modality"), header.get("SeriesInstanceUID"), header.get("PatientID")
        except Exception:  # other files lie among the images, and what a damaged header can raise has no end
            continue
        if modality == "CT" and uid:
            patient = re.sub(r"[^A-Za-z0-9_-]+", "_", str(patient or "unnamed"))[:64]
            series[f"{patient}-{hashlib.sha256(str(uid).encode()).hexdigest()[:8]}"].append(path)
    if not series:
        raise InputError(f"no CT images (DICOM, modality CT) below {source}")
    return dict(series)


def read_series(name: str, files: Sequence[Path]) -> tuple[Volume, tuple[float, float, float]]:
    """A series in Hounsfield units as (X, Y, Z), stored LAS, with the spacing in mm.

    Raises:
        CaseError: slices are missing, doubled, too few, or of different sizes, or the file is damaged.
    """
    if len(files) < FEWEST_SLICES:
        raise CaseError(name, f"expected at least {FEWEST_SLICES} slices, found {len(files)}")
    try:
        slices = [pydicom.dcmread(path) for path in files]
        orientation = np.asarray(slices[0].ImageOrientationPatient, float).reshape(2, 3)
        normal = np.cross(*orientation)
        slices.sort(key=lambda image: float(normal @ np.asarray(image.ImagePositionPatient, float)))
        heights_mm = np.array([normal @ np.asarray(image.ImagePositionPatient, float) for image in slices])
        rows_mm, columns_mm = (float(value) for value in slices[0].PixelSpacing)
        if slices[0].Rows * slices[0].Columns * len(slices) > MOST_VOXELS:
            raise CaseError(name, "more than 1024³ voxels; not a CT scan")
        planes = [
            image.pixel_array * np.float32(image.get("RescaleSlope", 1)) + np.float32(image.get("RescaleIntercept", 0))
            for image in slices
        ]
    except CaseError:
        raise
    except Exception as error:  # what damaged DICOM can raise has no end
        raise CaseError(name, f"the DICOM files cannot be read ({error})") from error
    if len({plane.shape for plane in planes}) > 1:
        raise CaseError(name, "slices of different sizes in one series")
    if min(abs(normal[2]), abs(orientation[0, 0]), abs(orientation[1, 1])) < 0.9:
        raise CaseError(name, "expected axial slices with rows from side to side, found another orientation")
    gaps_mm = np.diff(heights_mm)
    gap_mm = float(np.median(gaps_mm))
    if gap_mm <= 0 or np.abs(gaps_mm - gap_mm).max() > 0.1 * gap_mm:
        raise CaseError(name, f"slices are missing or doubled: gaps from {gaps_mm.min():.2f} to {gaps_mm.max():.2f} mm")
    spacing_mm = columns_mm, rows_mm, gap_mm
    extent_mm = np.prod([n * mm for n, mm in zip((*planes[0].shape[::-1], len(planes)), spacing_mm, strict=True)])
    if not (min(spacing_mm) > 0 and extent_mm <= MOST_VOXELS):
        raise CaseError(name, f"voxels of {spacing_mm} mm cannot be resampled to 1 mm; check the header")
    # DICOM's rows run along the first direction (to the left), its columns along the second (to the back).
    volume = np.stack(planes, axis=-1).transpose(1, 0, 2).astype(np.float32)
    if not np.isfinite(volume).all():
        raise CaseError(name, "the rescale slope or intercept is missing, so there are no Hounsfield units")
    if orientation[0, 0] < 0:
        volume = volume[::-1]
    if orientation[1, 1] > 0:
        volume = volume[:, ::-1]
    return volume if normal[2] > 0 else volume[:, :, ::-1], spacing_mm


def prepare(name: str, volume: Volume, spacing_mm: Sequence[float]) -> Prepared:
    """What WDM's published script for LIDC-IDRI makes of a scan (wdm-3d, utils/preproc_lidc-idri.py).

    Resampled to 1 mm by cubic splines with the outermost voxels' centres where they were, cut to the central 256³,
    clipped to -1000 HU and the 0.999 quantile of what is left, scaled to [0, 1]. The script fails on scans that are
    smaller than that along an axis; here they are padded with 0, after all that.

    Args:
        name: for messages.
        volume: (X, Y, Z) in Hounsfield units, of any size, stored LAS.

    Raises:
        CaseError: nothing but air.
    """
    cut: Volume = ndimage.zoom(volume, spacing_mm, order=3, mode="nearest")
    for axis in range(3):
        cut = centre(cut, axis, min(SIZE, cut.shape[axis]))
    lowest = max(float(cut.min()), AIR_HU)
    upper = float(np.quantile(cut, UPPER_QUANTILE))
    if upper <= lowest:
        raise CaseError(name, f"nothing above {lowest:g} HU; is the rescale slope of the scanner missing?")
    unit = (np.clip(cut, lowest, upper) - lowest) / (upper - lowest)
    for axis in range(3):
        unit = centre(unit, axis, SIZE)
    return Prepared(np.ascontiguousarray(unit, np.float32), (lowest, upper), cut.shape)
