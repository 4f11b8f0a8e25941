"""DICOM series: their headers, read within bounds and checked before anything is converted.

Headers are hostile until proven otherwise: what a damaged one can raise has no end, so a file whose header cannot be
read is none of ours, and whatever decides how much a converter would read is looked at first.
"""

import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cwdm.errors import needs_extra

with needs_extra("scans", "DICOM"):
    import pydicom
    from pydicom.dataset import Dataset
    from pydicom.filereader import read_file_meta_info
    from pydicom.uid import (
        DeflatedExplicitVRLittleEndian,
        EnhancedMRImageStorage,
        MediaStorageDirectoryStorage,
        RawDataStorage,
    )

FEWEST_SLICES = 8
MOST_SLICES = 2048
MOST_VOXELS = 512**3
MOST_FILES = 20_000
MOST_BYTES = 1 << 31
TILT_DEGREES = 0.5
"""What a stack may be sheared by; a gantry tilts by several degrees, and rounding in headers stays far below."""

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
class Slice:
    """One DICOM file: its header, as it is and flat, and what is wrong with it."""

    path: Path
    uid: str
    header: Dataset
    flat: Mapping[str, Any]
    problem: str


@dataclass(frozen=True)
class Series:
    """A DICOM series or, where one holds several echoes or phase images, one part of it.

    Attributes:
        label: number and description, for messages.
        uid: SeriesInstanceUID.
        number: SeriesNumber.
        description: SeriesDescription.
        files: in the order of the slices along their normal.
        fields: of the header, under the names and in the units of BIDS sidecars.
        patient: PatientID and PatientName.
        study: StudyDate, or StudyInstanceUID where there is none.
        problem: why the series cannot be used.
    """

    label: str
    uid: str
    number: int
    description: str
    files: tuple[Path, ...]
    fields: Mapping[str, Any]
    patient: tuple[str, str]
    study: str
    problem: str = ""


@dataclass(frozen=True)
class FoundSeries:
    """What a folder of DICOM files holds.

    Attributes:
        series: by number.
        doubled: files of images that are there already.
        damaged: files whose header cannot be read.
    """

    series: list[Series]
    doubled: list[Path]
    damaged: list[Path]


def find_series(paths: Iterable[Path]) -> FoundSeries:
    """The series of images among DICOM files."""
    parts: dict[tuple[str, str, str], list[Slice]] = defaultdict(list)
    seen: set[str] = set()
    doubled: list[Path] = []
    damaged: list[Path] = []
    for path in paths:
        try:
            with warnings.catch_warnings(action="ignore"):  # what is wrong in a header is told in words of our own
                one, key = _look_at(path)
        except Exception:  # what a damaged header can raise has no end
            damaged.append(path)
            continue
        if one is None:
            continue
        if one.uid in seen:
            doubled.append(path)
        else:
            parts[key].append(one)
        seen.add(one.uid)
    in_series = defaultdict(list)
    for (uid, _, _), slices in parts.items():
        in_series[uid].append(slices)
    found = [
        _series(slices, of_several=len(of_one) > 1, in_all=sum(map(len, of_one)))
        for of_one in in_series.values()
        for slices in of_one
    ]
    return FoundSeries(sorted(found, key=lambda series: (series.number, series.label)), doubled, damaged)


def dicom_files(folder: Path) -> Iterator[Path]:
    """Files below a folder that begin as DICOM files do."""
    return (path for path in walk(folder) if _is_dicom(path))


def walk(folder: Path) -> Iterator[Path]:
    """Files below a folder in order, without hidden ones; folders that are links are not followed."""
    number = 0
    for below, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            number += 1
            if number > MOST_FILES:
                return
            if not name.startswith("."):
                yield Path(below, name)


def study_of(folder: Path) -> str:
    """StudyInstanceUID of the first image in a folder; empty where there is none."""
    for path in dicom_files(folder):
        with suppress(Exception):  # a damaged header, as above
            if (header := _read_header(path)).get("Rows"):
                return str(header.get("StudyInstanceUID", ""))
    return ""


def _look_at(path: Path) -> tuple[Slice | None, tuple[str, str, str]]:
    """An image and the part of a series that it belongs to; None for DICOM files without an image."""
    header = _read_header(path)
    if not header.get("Rows") or not header.get("SeriesInstanceUID"):
        if header.get("Modality", "MR") != "MR" or header.file_meta.MediaStorageSOPClassUID in _NO_IMAGES:
            return None, ("", "", "")
        raise ValueError("no image")
    flat = _flat(header)
    key = str(header.SeriesInstanceUID), _component(flat), _text(flat.get("EchoTime"))
    uid = str(header.get("SOPInstanceUID") or path)
    return Slice(path, uid, header, flat, _problem_of_file(path, header)), key


def _read_header(path: Path) -> Dataset:
    """What matters of the header of a DICOM file; raises anything."""
    with path.open("rb") as file:
        syntax = read_file_meta_info(path).get("TransferSyntaxUID", "")
        if syntax == DeflatedExplicitVRLittleEndian:
            raise ValueError("deflated as a whole, which could unfold to any size")
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS))
        header.pixels_at = file.tell()
    return header


def _is_dicom(path: Path) -> bool:
    if path.name.lower().endswith((*_OTHER_FILES, ".nii", ".nii.gz")) or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _problem_of_file(path: Path, header: Dataset) -> str:
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


def _series(slices: list[Slice], of_several: bool, in_all: int) -> Series:
    header = slices[0].header
    fields = _fields(slices[0].flat)
    number = _number(header.get("SeriesNumber")) or 0
    description = _text(header.get("SeriesDescription"))
    label = f"series {int(number)} '{description}'"
    if of_several:
        component = fields.get("ComplexImageComponent", "")
        label += f" (echo {fields.get('EchoTime', 0) * 1000:g} ms{', ' + component.lower() if component else ''})"
    try:
        ordered, problem = _ordered(slices, in_all)
    except Exception as error:  # as above
        ordered, problem = slices, f"the geometry in its headers cannot be read ({error})"
    return Series(
        label=label,
        uid=str(header.SeriesInstanceUID),
        number=int(number),
        description=description,
        files=tuple(one.path for one in ordered),
        fields=fields,
        patient=(_text(header.get("PatientID")), _text(header.get("PatientName"))),
        study=_text(header.get("StudyDate")) or str(header.get("StudyInstanceUID", "")),
        problem=next((one.problem for one in slices if one.problem), "") or problem,
    )


def _ordered(slices: list[Slice], in_all: int) -> tuple[list[Slice], str]:
    """The slices along their normal, and what is wrong with the stack."""
    header = slices[0].header
    if header.get("NumberOfFrames", 1) not in (None, 1):
        several = "several multi-frame files in one series; give each its own" if len(slices) > 1 else ""
        return slices, several
    if len(slices) < FEWEST_SLICES:
        return slices, f"only {len(slices)} slices, expected at least {FEWEST_SLICES}"
    if len(slices) > MOST_SLICES or len(slices) * int(header.Rows) * int(header.Columns) > MOST_VOXELS:
        return slices, f"{len(slices)} slices of {header.Rows}×{header.Columns}, more than {MOST_VOXELS:,} voxels"
    if len({(one.header.Rows, one.header.Columns, tuple(one.header.PixelSpacing)) for one in slices}) > 1:
        return slices, "slices of different sizes in one series"
    directions = np.array([one.header.ImageOrientationPatient for one in slices], float)
    if np.abs(directions - directions[0]).max() > 0.01:
        return slices, "slices of several orientations in one series"
    normal = np.cross(directions[0, :3], directions[0, 3:])
    positions = np.array([one.header.ImagePositionPatient for one in slices], float)
    order = np.argsort(positions @ normal, kind="stable")
    return [slices[k] for k in order], _problem_of_stack(positions[order], normal, header, in_all)


def _problem_of_stack(positions: np.ndarray, normal: np.ndarray, header: Dataset, in_all: int) -> str:
    heights = positions @ normal
    gaps = np.diff(heights)
    gap = float(np.median(gaps))
    if not np.isfinite(heights).all() or np.ptp(heights) < 1e-3:
        return "all slices lie at one place, expected a stack of them"
    if gap < 1e-3 or (gaps < 0.1 * gap).any():
        places = 1 + np.count_nonzero(gaps > 1e-3)
        return f"4D: {len(positions)} slices at {places} places, expected one each; export one volume alone"
    if np.abs(gaps - gap).max() > 0.1 * gap:
        return f"slices are missing: they lie {gaps.min():.2f} to {gaps.max():.2f} mm apart; export the series again"
    expected = _number(header.get("ImagesInAcquisition")) or 0
    if in_all < expected:
        return f"slices are missing: {in_all} of {expected:g}; export the series again"
    way = positions[-1] - positions[0]
    lean = np.degrees(np.arccos(np.clip(way @ normal / np.linalg.norm(way), -1, 1)))
    if lean > TILT_DEGREES:
        return f"the gantry was tilted: the stack leans by {lean:.1f} degrees; resample it to right angles"
    return ""


# Headers under the names of BIDS sidecars


def _fields(flat: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {name: _text(flat[name]) for name in _TEXT if _text(flat.get(name))}
    for name in _LISTS:
        if flat.get(name):
            value = flat[name]
            fields[name] = [_text(part) for part in ([value] if isinstance(value, str) else value)]
    for name, own in _MILLISECONDS.items():
        if (milliseconds := _number(flat.get(name))) is not None:
            fields[own] = milliseconds / 1000
    for name in ("FlipAngle", "MagneticFieldStrength", "SliceThickness", "ContrastBolusVolume"):
        if (number := _number(flat.get(name))) is not None:
            fields[name] = number
    if agent := _text(flat.get("ContrastBolusAgent")):
        fields["ContrastBolusIngredient"] = agent
    if component := _component(flat):
        fields["ComplexImageComponent"] = component
    fields["AngioFlag"] = _text(flat.get("AngioFlag"))
    fields["SeriesNumber"] = int(_number(flat.get("SeriesNumber")) or 0)
    return fields


def _flat(header: Dataset) -> dict[str, Any]:
    """Keyword -> value; of multi-frame files also what holds for all frames, or for the first."""
    flat: dict[str, Any] = {}
    sequences = [header]
    while sequences:
        for element in sequences.pop(0):
            if element.VR != "SQ":
                flat.setdefault(element.keyword, element.value)
            elif header.get("SOPClassUID") == EnhancedMRImageStorage:
                sequences.extend(element.value[:1])
    return flat


def _component(flat: Mapping[str, Any]) -> str:
    """PHASE, REAL or IMAGINARY where that is what the voxels hold; empty for magnitudes."""
    own = _text(flat.get("ComplexImageComponent")).upper()
    types = {_text(part).upper() for part in flat.get("ImageType") or ()}
    for name, marks in COMPONENTS.items():
        if own == name or types & marks:
            return name
    return ""


COMPONENTS = {
    "PHASE": {"P", "PHASE", "PHASE MAP", "P_FFE", "P_SE", "P_IR"},
    "REAL": {"R", "REAL", "R_FFE", "R_SE", "R_IR"},
    "IMAGINARY": {"I", "IMAGINARY", "I_FFE", "I_SE", "I_IR"},
}
"""Component of the complex signal -> how image types say so."""


def _text(value: object) -> str:
    """A value as one short printable line."""
    text = "" if value is None else str(value)
    return "".join(letter if letter.isprintable() else "?" for letter in text).strip()[:200]


def _number(value: Any) -> float | None:
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if len(value) else None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None
