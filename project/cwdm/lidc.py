"""LIDC-IDRI and other CT from DICOM to what WDM is trained on: 1 mm, 256³ around the centre, [0, 1]."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
from scipy import ndimage

from cwdm.brats import write_nifti
from cwdm.errors import CaseError, CwdmError, InputError
from cwdm.files import check_apart, check_writable, remove_stale
from cwdm.preprocess import centre

AIR_HU = -1000.0
UPPER_QUANTILE = 0.999
SIZE = 256
FEWEST_SLICES = 8
MOST_VOXELS = 1024**3

Volume = npt.NDArray[np.float32]


def prepare_lidc(source: Path, out: Path, on_case: Callable[[str], None] = lambda line: None) -> list[CwdmError]:
    """Write OUT/<patient>-<series>.nii.gz for every CT series below a folder of DICOM files; finished ones stay.

    Returns:
        The series that could not be used, with the reason; the others are written.

    Raises:
        InputError: there is no CT series.
        OutputError: the output cannot be written.
    """
    check_apart(out, source)
    series = find_series(source)
    check_writable(out)
    remove_stale(out)
    faults: list[CwdmError] = []
    for name, files in series.items():
        path = out / f"{name}.nii.gz"
        if path.exists():
            on_case(f"{name}: there already")
            continue
        try:
            volume = prepare(name, *read_series(name, files))
        except CaseError as error:
            faults.append(error)
            on_case(f"error: {error}")
            continue
        write_nifti(path, volume, np.diag([-1.0, -1.0, 1.0, 1.0]), "CT, [0, 1] from -1000 HU")
        on_case(f"{name}: written")
    return faults


def find_series(source: Path) -> dict[str, list[Path]]:
    """Name -> files of every CT series below `source`; the name is the patient's and a digest of the series' number.

    Raises:
        InputError: there is none.
    """
    if not source.is_dir():
        raise InputError(f"the DICOM folder {source} does not exist; check the path")
    series: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(source.rglob("*")):
        if not path.is_file():
            continue
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
    """A series in Hounsfield units as (X, Y, Z), stored LPS, with the spacing in mm.

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
    # DICOM's rows run along the first direction (to the left), its columns along the second (to the back): LPS.
    volume = np.stack(planes, axis=-1).transpose(1, 0, 2).astype(np.float32)
    if not np.isfinite(volume).all():
        raise CaseError(name, "the rescale slope or intercept is missing, so there are no Hounsfield units")
    if orientation[0, 0] < 0:
        volume = volume[::-1]
    if orientation[1, 1] < 0:
        volume = volume[:, ::-1]
    return volume if normal[2] > 0 else volume[:, :, ::-1], spacing_mm


def prepare(name: str, volume: Volume, spacing_mm: Sequence[float]) -> Volume:
    """Resample to 1 mm, clip to -1000 HU and the 0.999 quantile, scale to [0, 1], crop or pad to 256³.

    Args:
        name: for messages.
        volume: (X, Y, Z) in Hounsfield units, of any size; what is outside becomes air.

    Raises:
        CaseError: nothing but air.
    """
    resampled: Volume = ndimage.zoom(volume, spacing_mm, order=1, mode="nearest", grid_mode=True)
    upper = float(np.quantile(resampled, UPPER_QUANTILE))
    if upper <= AIR_HU:
        raise CaseError(name, f"nothing above {AIR_HU:g} HU; is the rescale slope of the scanner missing?")
    unit = (np.clip(resampled, AIR_HU, upper) - AIR_HU) / (upper - AIR_HU)
    for axis in range(3):
        unit = centre(unit, axis, SIZE)
    return np.ascontiguousarray(unit, np.float32)
