"""DICOM series: grouped, put in order and checked before anything is converted."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cwdm.scans.headers import MOST_VOXELS, Header, component_of, fields_of, number_of, read_header, text_of

FEWEST_SLICES = 8
MOST_SLICES = 2048
TILT_DEGREES = 0.5
"""What a stack may be sheared by; a gantry tilts by several degrees, and rounding in headers stays far below."""


@dataclass(frozen=True)
class Series:
    """A DICOM series or, where one holds several echoes or phase images, one part of it.

    Attributes:
        label: number and description, for messages.
        uid: SeriesInstanceUID.
        number: SeriesNumber.
        description: SeriesDescription.
        slices: file, and number of the frame in it, in the order along their normal.
        fields: of the header, under the names and in the units of BIDS sidecars.
        patient: PatientID and PatientName.
        study: StudyDate, or StudyInstanceUID where there is none.
        problem: why the series cannot be used.
    """

    label: str
    uid: str
    number: int
    description: str
    slices: tuple[tuple[Path, int], ...]
    fields: Mapping[str, Any]
    patient: tuple[str, str]
    study: str
    problem: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """Its files, once each."""
        return tuple(dict.fromkeys(path for path, _ in self.slices))


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
    parts: dict[tuple[str, str, str], list[Header]] = defaultdict(list)
    seen: set[str] = set()
    doubled: list[Path] = []
    damaged: list[Path] = []
    for path in paths:
        try:
            one = read_header(path)
        except Exception:  # what a damaged header can raise has no end
            damaged.append(path)
            continue
        if one is None:
            continue
        if one.uid in seen:
            doubled.append(path)
        else:
            parts[_part_of(one.frames[0])].append(one)
        seen.add(one.uid)
    in_series = defaultdict(list)
    for (uid, _, _), files in parts.items():
        in_series[uid].append(files)
    found = [
        _series(files, of_several=len(of_one) > 1, in_all=sum(map(len, of_one)))
        for of_one in in_series.values()
        for files in of_one
    ]
    return FoundSeries(sorted(found, key=lambda series: (series.number, series.label)), doubled, damaged)


def _part_of(frame: Mapping[str, Any]) -> tuple[str, str, str]:
    """The series of a slice, and what parts one series into several images."""
    return str(frame["SeriesInstanceUID"]), component_of(frame), text_of(frame.get("EchoTime"))


def _series(files: list[Header], of_several: bool, in_all: int) -> Series:
    first = files[0].frames[0]
    fields = fields_of(first)
    number = int(number_of(first.get("SeriesNumber")) or 0)
    description = text_of(first.get("SeriesDescription"))
    label = f"series {number} '{description}'"
    if of_several:
        component = fields.get("ComplexImageComponent", "")
        label += f" (echo {fields.get('EchoTime', 0) * 1000:g} ms{', ' + component.lower() if component else ''})"
    slices = [(file.path, number) for file in files for number in range(len(file.frames))]
    frames = [frame for file in files for frame in file.frames]
    order: Sequence[int] = range(len(frames))
    try:
        if not (problem := _problem_of_frames(files, frames)):
            order, problem = _in_order(frames, in_all)
    except Exception as error:  # what a damaged header can raise has no end
        problem = f"the geometry in its headers cannot be read ({error})"
    return Series(
        label=label,
        uid=str(first["SeriesInstanceUID"]),
        number=number,
        description=description,
        slices=tuple(slices[k] for k in order),
        fields=fields,
        patient=(text_of(first.get("PatientID")), text_of(first.get("PatientName"))),
        study=text_of(first.get("StudyDate")) or text_of(first.get("StudyInstanceUID")),
        problem=next((file.problem for file in files if file.problem), "") or problem,
    )


def _problem_of_frames(files: list[Header], frames: list[Mapping[str, Any]]) -> str:
    """Why slices do not belong together, or are too few or too many."""
    first = frames[0]
    rows, columns = int(first["Rows"]), int(first["Columns"])
    if len(frames) > len(files) > 1:
        return "several multi-frame files in one series; give each its own"
    if len({_part_of(frame) for frame in frames}) > 1:
        return "one multi-frame file with several echoes, or magnitude and phase; export each alone"
    if len(frames) < FEWEST_SLICES:
        return f"only {len(frames)} slices, expected at least {FEWEST_SLICES}"
    if len(frames) > MOST_SLICES or len(frames) * rows * columns > MOST_VOXELS:
        return f"{len(frames)} slices of {rows}×{columns}, more than {MOST_VOXELS:,} voxels"
    if len({(one["Rows"], one["Columns"], tuple(one["PixelSpacing"])) for one in frames}) > 1:
        return "slices of different sizes in one series"
    directions = np.array([one["ImageOrientationPatient"] for one in frames], float)
    if np.abs(directions - directions[0]).max() > 0.01:
        return "slices of several orientations in one series"
    return ""


def _in_order(frames: list[Mapping[str, Any]], in_all: int) -> tuple[Sequence[int], str]:
    """The order of the slices along their normal, and what is wrong with the stack."""
    across, down = np.array(frames[0]["ImageOrientationPatient"], float).reshape(2, 3)
    normal = np.cross(across, down)
    positions = np.array([one["ImagePositionPatient"] for one in frames], float)
    order = np.argsort(positions @ normal, kind="stable")
    in_acquisition = number_of(frames[0].get("ImagesInAcquisition")) or 0
    if problem := _problem_of_stack(positions[order], normal):
        return order.tolist(), problem
    if in_all < in_acquisition and "NumberOfFrames" not in frames[0]:
        return order.tolist(), f"slices are missing: {in_all} of {in_acquisition:g}; export the series again"
    return order.tolist(), ""


def _problem_of_stack(positions: np.ndarray, normal: np.ndarray) -> str:
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
    way = positions[-1] - positions[0]
    lean = np.degrees(np.arccos(np.clip(way @ normal / np.linalg.norm(way), -1, 1)))
    if lean > TILT_DEGREES:
        return f"the gantry was tilted: the stack leans by {lean:.1f} degrees; resample it to right angles"
    return ""
