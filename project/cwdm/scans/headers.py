"""Headers of DICOM files, read within bounds.

Headers are hostile until proven otherwise: what a damaged one can raise has no end, so whoever reads one here must
catch anything, and whatever decides how much a converter would read is looked at first.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cwdm.errors import InputError, needs_extra
from cwdm.files import is_file, open_file

with needs_extra("scans", "DICOM"):
    import pydicom
    from pydicom.dataset import Dataset
    from pydicom.filereader import read_file_meta_info
    from pydicom.uid import DeflatedExplicitVRLittleEndian, MediaStorageDirectoryStorage, RawDataStorage

MOST_FRAMES = 4096
MOST_VOXELS = 512**3
MOST_FILES = 20_000
MOST_BYTES = 1 << 31

_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "Modality", "ImageType", "SeriesInstanceUID", "StudyInstanceUID", "StudyDate"),
    *("PatientID", "PatientName", "SeriesNumber", "InstanceNumber", "SeriesDescription", "ProtocolName"),
    *("SequenceName", "ScanningSequence", "SequenceVariant", "ScanOptions", "AngioFlag", "MRAcquisitionType"),
    *("EchoTime", "EffectiveEchoTime", "RepetitionTime", "InversionTime", "InversionTimes", "FlipAngle"),
    *("ContrastBolusAgent", "ContrastBolusVolume", "ComplexImageComponent", "ImagesInAcquisition"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "Rows", "Columns"),
    *("BitsAllocated", "SamplesPerPixel", "NumberOfFrames", "Manufacturer", "MagneticFieldStrength"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)

_NO_IMAGES = (MediaStorageDirectoryStorage, RawDataStorage)
_TEXT = ("Modality", "SeriesDescription", "ProtocolName", "SequenceName", "MRAcquisitionType", "Manufacturer")
_LISTS = ("ImageType", "ScanningSequence", "SequenceVariant", "ScanOptions")
_MILLISECONDS = {"EchoTime": "EchoTime", "EffectiveEchoTime": "EchoTime", "RepetitionTime": "RepetitionTime"}
_MILLISECONDS |= {"InversionTime": "InversionTime", "InversionTimes": "InversionTime"}
_OTHER_FILES = (".json", ".txt", ".csv", ".tsv", ".bval", ".bvec", ".xml", ".pdf", ".png", ".jpg", ".zip", ".md")


@dataclass(frozen=True)
class Header:
    """A DICOM file with an image.

    Attributes:
        path: the file.
        uid: SOPInstanceUID.
        frames: keyword -> value for each of its slices; one, but for multi-frame files.
        problem: why its voxels cannot be used, as far as header and size tell.
    """

    path: Path
    uid: str
    frames: tuple[Mapping[str, Any], ...]
    problem: str


def read_header(path: Path) -> Header | None:
    """The header of a file; None for DICOM without an image. Raises anything, of a damaged one."""
    with _without_warnings():
        return _image_of(path)


def _image_of(path: Path) -> Header | None:
    header = _read(path)
    if not header.get("Rows") or not header.get("SeriesInstanceUID"):
        if header.get("Modality", "MR") != "MR" or header.file_meta.MediaStorageSOPClassUID in _NO_IMAGES:
            return None
        raise ValueError("no image")
    uid = str(header.get("SOPInstanceUID") or path)
    return Header(path, uid, tuple(frames_of(header)), _problem(path, header))


def frames_of(header: Dataset) -> list[dict[str, Any]]:
    """Keyword -> value for each slice: what the header says, in multi-frame files with what it says of that slice."""
    shared = _nested(header.get("SharedFunctionalGroupsSequence", [])[:1])
    groups = header.get("PerFrameFunctionalGroupsSequence", [])
    common = {element.keyword: element.value for element in header if element.VR != "SQ"} | shared
    return [common | _nested([group]) for group in groups[:MOST_FRAMES]] or [common]


def dicom_files(folder: Path) -> Iterator[Path]:
    """Files below a folder that begin as DICOM files do."""
    return (path for path in walk(folder) if is_dicom(path))


def walk(folder: Path) -> Iterator[Path]:
    """Files below a folder in order, without hidden ones; folders that are links are not followed.

    Raises:
        InputError: there are too many to be one patient's.
    """
    number = 0
    for below, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            number += 1
            if number > MOST_FILES:
                raise InputError(
                    f"{folder} holds more than {MOST_FILES:,} files; give each patient a folder of its own"
                )
            if not name.startswith("."):
                yield Path(below, name)


def study_of(folder: Path) -> str:
    """StudyInstanceUID of the first image in a folder; empty where there is none."""
    for path in dicom_files(folder):
        with suppress(Exception), _without_warnings():  # a damaged header, as above
            if (header := _read(path)).get("Rows"):
                return str(header.get("StudyInstanceUID", ""))
    return ""


def fields_of(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A slice's header under the names and in the units of BIDS sidecars."""
    fields: dict[str, Any] = {name: text_of(flat[name]) for name in _TEXT if text_of(flat.get(name))}
    for name in _LISTS:
        if flat.get(name):
            value = flat[name]
            fields[name] = [text_of(part) for part in ([value] if isinstance(value, str) else value)]
    for name, own in _MILLISECONDS.items():
        if (milliseconds := number_of(flat.get(name))) is not None:
            fields[own] = milliseconds / 1000
    for name in ("FlipAngle", "MagneticFieldStrength", "SliceThickness", "ContrastBolusVolume"):
        if (number := number_of(flat.get(name))) is not None:
            fields[name] = number
    if agent := text_of(flat.get("ContrastBolusAgent")):
        fields["ContrastBolusIngredient"] = agent
    if component := component_of(flat):
        fields["ComplexImageComponent"] = component
    fields["AngioFlag"] = text_of(flat.get("AngioFlag"))
    fields["SeriesNumber"] = int(number_of(flat.get("SeriesNumber")) or 0)
    return fields


def component_of(flat: Mapping[str, Any]) -> str:
    """PHASE, REAL or IMAGINARY where that is what the voxels hold; empty for magnitudes."""
    own = text_of(flat.get("ComplexImageComponent")).upper()
    types = {text_of(part).upper() for part in flat.get("ImageType") or ()}
    return next((name for name, marks in COMPONENTS.items() if own == name or types & marks), "")


COMPONENTS = {
    "PHASE": {"P", "PHASE", "PHASE MAP", "P_FFE", "P_SE", "P_IR"},
    "REAL": {"R", "REAL", "R_FFE", "R_SE", "R_IR"},
    "IMAGINARY": {"I", "IMAGINARY", "I_FFE", "I_SE", "I_IR"},
}
"""Component of the complex signal -> how image types say so."""


def text_of(value: object) -> str:
    """A value as one short printable line."""
    text = "" if value is None else str(value)
    return "".join(letter if letter.isprintable() else "?" for letter in text).strip()[:200]


def number_of(value: Any) -> float | None:
    """A value as a finite number, the first of several; None if it is none."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if len(value) else None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


def _without_warnings() -> AbstractContextManager[object]:
    """What is wrong in a header is told in words of our own; pydicom's would show patients' data."""
    return warnings.catch_warnings(action="ignore")


def _nested(items: Sequence[Dataset]) -> dict[str, Any]:
    """Keyword -> value of all that some items hold, however deep."""
    flat: dict[str, Any] = {}
    waiting = list(items)
    while waiting:
        for element in waiting.pop(0):
            if element.VR == "SQ":
                waiting.extend(element.value[:1])
            else:
                flat.setdefault(element.keyword, element.value)
    return flat


def _read(path: Path) -> Dataset:
    """What matters of the header of a DICOM file; raises anything."""
    with path.open("rb") as file:
        syntax = read_file_meta_info(path).get("TransferSyntaxUID", "")
        if syntax == DeflatedExplicitVRLittleEndian:
            raise ValueError("deflated as a whole, which could unfold to any size")
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS))
        header.pixels_at = file.tell()
    return header


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do."""
    if path.name.lower().endswith((*_OTHER_FILES, ".nii", ".nii.gz")) or not is_file(path):
        return False
    try:
        with open_file(path) as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _problem(path: Path, header: Dataset) -> str:
    """Why the voxels of a file cannot be used, as far as its header and size tell."""
    size = path.stat().st_size
    frames = int(header.get("NumberOfFrames") or 1)
    voxels = int(header.Rows) * int(header.Columns) * frames
    if size > MOST_BYTES or voxels > MOST_VOXELS:
        return f"{path.name} holds {voxels:,} voxels, expected at most {MOST_VOXELS:,}"
    if int(header.get("SamplesPerPixel") or 1) != 1:
        return f"{path.name} is in colour, expected intensities"
    expected = voxels * int(header.get("BitsAllocated") or 16) // 8
    plain = not header.file_meta.TransferSyntaxUID.is_compressed
    if plain and size - header.pixels_at < expected:
        return f"{path.name} is truncated: {size:,} bytes; export the series again"
    return ""
