"""Phantoms as a scanner gives them: skull on, tilted, in thick slices, and as DICOM."""

import json
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from scipy import ndimage

from cwdm.images import write_nifti
from cwdm.phantoms import add_skull, make_phantom
from cwdm.phantoms.patients import Phantom

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

HEADERS: dict[str, dict[str, Any]] = {
    "t1n": {
        **{"SeriesDescription": "AX T1 SE", "ScanningSequence": "SE", "SequenceVariant": "SK"},
        **{"RepetitionTime": 550.0, "EchoTime": 11.0, "SeriesNumber": 3},
    },
    "t1c": {
        **{"SeriesDescription": "AX T1 SE", "ScanningSequence": "SE", "SequenceVariant": "SK"},
        **{"RepetitionTime": 550.0, "EchoTime": 11.0, "ContrastBolusAgent": "GADOVIST", "SeriesNumber": 8},
    },
    "t2w": {
        **{"SeriesDescription": "AX T2 TSE", "ScanningSequence": "SE", "SequenceVariant": "SK"},
        **{"RepetitionTime": 5200.0, "EchoTime": 102.0, "SeriesNumber": 4},
    },
    "t2f": {
        **{"SeriesDescription": "AX FLAIR", "ScanningSequence": ["SE", "IR"], "SequenceVariant": ["SK", "MP"]},
        **{"RepetitionTime": 9000.0, "EchoTime": 110.0, "InversionTime": 2500.0, "SeriesNumber": 5},
    },
}
"""Of a usual protocol of spin echoes."""


@cache
def head(seed: int = 0, spacing_mm: float = 4.0) -> Phantom:
    """A small phantom with skull and scalp, of voxels of 4 mm; not to be written to."""
    shape = tuple(int(mm / spacing_mm) for mm in (192, 228, 200))
    return add_skull(make_phantom(seed, shape, spacing_mm))


def tilt(degrees: tuple[float, float, float], shift_mm: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    """A rigid movement: rotations about x, y and z, one after the other, then a shift."""
    matrix = np.eye(4)
    for axis, angle in enumerate(np.radians(degrees)):
        turn = np.eye(4)
        a, b = (k for k in range(3) if k != axis)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    matrix[:3, 3] = shift_mm
    return matrix


def scanned(
    volume: np.ndarray,
    affine: np.ndarray,
    voxel_mm: tuple[float, float, float] = (2.0, 2.0, 5.0),
    movement: np.ndarray | None = None,
    extent_mm: tuple[float, float, float] = (190, 226, 190),
) -> tuple[np.ndarray, np.ndarray]:
    """A volume in the voxels of another scan: averaged over thick slices, on axes that are turned in the head.

    Returns:
        volume and affine, stored LPS as seen from the scan's own axes.
    """
    shape = tuple(int(mm / edge) for mm, edge in zip(extent_mm, voxel_mm, strict=True))
    centre = affine @ [*((np.array(volume.shape) - 1) / 2), 1]
    axes = (movement if movement is not None else np.eye(4))[:3, :3] @ LPS[:3, :3] @ np.diag(voxel_mm)
    target = np.eye(4)
    target[:3, :3] = axes
    offset = (movement[:3, 3] if movement is not None else 0) - axes @ ((np.array(shape) - 1) / 2)
    target[:3, 3] = centre[:3] + offset
    edge_mm = np.linalg.norm(affine[:3, 0])
    parts = max(1, round(voxel_mm[2] / edge_mm))
    total = np.zeros(shape, np.float32)
    for part in range(parts):  # a slice is the mean over its thickness
        along = np.eye(4)
        along[2, 3] = (part + 0.5) / parts - 0.5
        pull = np.linalg.inv(affine) @ target @ along
        total += ndimage.affine_transform(volume.astype(np.float32), pull[:3, :3], pull[:3, 3], shape, order=1)
    return np.rint(total / parts).astype(np.int16), target


def write_dicom(
    folder: Path,
    volume: np.ndarray,
    affine: np.ndarray,
    modality: str = "t1n",
    patient: str = "P-17",
    study: str = "1.2.826.0.1.3680043.8.498.1",
    leave_out: tuple[int, ...] = (),
    lean: float = 0.0,
    **changes: Any,
) -> Path:
    """A series of single slices; `lean` shears the stack, mm a slice along the columns, as a tilted gantry does.

    `changes` are attributes of every slice, None to leave one out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series, frame = generate_uid(), f"{study}.9"
    lps = LPS @ affine
    edges = np.linalg.norm(lps[:3, :3], axis=0)
    across, down, along = (lps[:3, :3] / edges).T
    for k in range(volume.shape[2]):
        if k in leave_out:
            continue
        image = _new_image()
        attributes: Mapping[str, Any] = {
            **{"Modality": "MR", "PatientID": patient, "PatientName": f"Doe^{patient}", "PatientSex": "F"},
            **{"PatientBirthDate": "19700101", "StudyInstanceUID": study, "StudyDate": "20240131", "StudyID": "1"},
            **{
                "StudyTime": "101500",
                "SeriesInstanceUID": series,
                "FrameOfReferenceUID": frame,
                "InstanceNumber": k + 1,
            },
            **{
                "AccessionNumber": "",
                "ReferringPhysicianName": "",
                "PositionReferenceIndicator": "",
                "ScanOptions": "",
            },
            **{"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"], "Manufacturer": "SIEMENS", "PatientPosition": "HFS"},
            **{"MRAcquisitionType": "2D", "EchoTrainLength": 1, "FlipAngle": 90.0, "MagneticFieldStrength": 3.0},
            "ImagePositionPatient": [f"{x:.6f}" for x in lps[:3, 3] + k * edges[2] * along + k * lean * down],
            "ImageOrientationPatient": [f"{x:.9f}" for x in (*across, *down)],
            "PixelSpacing": [f"{edges[1]:.6f}", f"{edges[0]:.6f}"],
            "SliceThickness": f"{edges[2]:.6f}",
            "SpacingBetweenSlices": f"{edges[2]:.6f}",
            **HEADERS[modality],
            **changes,
        }
        for name, value in attributes.items():
            if value is not None:
                setattr(image, name, value)
        image.Rows, image.Columns = volume.shape[1], volume.shape[0]
        image.PixelData = np.ascontiguousarray(volume[:, :, k].T).astype(np.uint16).tobytes()
        image.save_as(folder / f"{(37 * k) % 997:04d}.dcm", enforce_file_format=True)
    return folder


def _new_image() -> Dataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = MRImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    image = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    image.SOPClassUID, image.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated = image.BitsStored = 16
    image.HighBit, image.PixelRepresentation = 15, 0
    return image


def write_study(folder: Path, modalities: tuple[str, ...] = ("t1n", "t1c", "t2w", "t2f"), **changes: Any) -> Path:
    """A patient of DICOM series, a folder each, every series on another grid."""
    for number, modality in enumerate(modalities):
        volume, affine = small(modality, number)
        write_dicom(folder / f"{number}", volume, affine, modality, **changes)
    return folder


@cache
def small(modality: str = "t1n", number: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A head in coarse voxels, each number on another tilted grid."""
    phantom = head()
    return scanned(
        phantom.volumes[modality],
        phantom.affine,
        (4.0 + 0.2 * number, 4.0 + 0.2 * number, 5.0),
        tilt((4.0 + number, -3.0, 6.0), (2.0, -3.0 + number, 1.0)),
    )


def write_head(path: Path, modality: str = "t1n", number: int = 0) -> Path:
    """The same as NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    volume, affine = small(modality, number)
    if path.name.endswith(".gz"):
        write_nifti(path, volume, affine)
    else:
        nib.save(nib.Nifti1Image(volume, affine), path)
    return path


def as_multi_frame(folder: Path, path: Path) -> Path:
    """The series of single slices in a folder as one enhanced MR file."""
    slices = sorted((pydicom.dcmread(file) for file in folder.iterdir()), key=lambda one: one.InstanceNumber)
    image, first = _new_image(), slices[0]
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = EnhancedMRImageStorage
    of_frames = {"ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"}
    of_frames |= {"EchoTime", "RepetitionTime", "InversionTime", "ScanningSequence", "SequenceVariant"}
    for element in first:
        if element.keyword not in of_frames | {"SOPClassUID", "SOPInstanceUID", "PixelData"}:
            image[element.tag] = element
    image.InstanceNumber, image.NumberOfFrames = 1, len(slices)
    shared = Dataset()
    shared.MRTimingAndRelatedParametersSequence = [_dataset(RepetitionTime=first.RepetitionTime)]
    shared.MREchoSequence = [_dataset(EffectiveEchoTime=float(first.EchoTime))]
    shared.MRModifierSequence = [_dataset(InversionRecovery="YES", InversionTimes=[float(first.InversionTime)])]
    shared.PlaneOrientationSequence = [_dataset(ImageOrientationPatient=first.ImageOrientationPatient)]
    size = {"PixelSpacing": first.PixelSpacing, "SliceThickness": first.SliceThickness}
    shared.PixelMeasuresSequence = [_dataset(**size)]
    image.SharedFunctionalGroupsSequence = [shared]
    image.PerFrameFunctionalGroupsSequence = [
        _dataset(
            FrameContentSequence=[_dataset(StackID="1", InStackPositionNumber=k, DimensionIndexValues=[1, k])],
            PlanePositionSequence=[_dataset(ImagePositionPatient=one.ImagePositionPatient)],
        )
        for k, one in enumerate(slices, 1)
    ]
    image.PixelData = b"".join(one.PixelData for one in slices)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save_as(path, enforce_file_format=True)
    return path


def _dataset(**attributes: Any) -> Dataset:
    dataset = Dataset()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset


# Validators of others


def program(name: str, comes_with: str) -> str:
    """A program on the path; without it the test is skipped."""
    if (path := shutil.which(name)) is None:
        pytest.skip(f"{name} is not installed ({comes_with})")
    return path


def told_by_validator(dataset: Path) -> dict[str, set[str]]:
    """Severity -> codes of what the official validator of BIDS says of a dataset."""
    checker = program("bids-validator-deno", "pip install bids-validator-deno")
    done = subprocess.run([checker, "--json", dataset], capture_output=True, text=True, check=False, timeout=300)
    told = defaultdict(set)
    for issue in json.loads(done.stdout)["issues"]["issues"]:
        told[issue["severity"]].add(issue["code"])
    return told
