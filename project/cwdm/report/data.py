"""What a report is made from: the JSON records of runs and cases, and the volumes that they speak of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from cwdm.arrays import Mask, Volume, bounding_box
from cwdm.errors import CaseError, CwdmError, InputError
from cwdm.files import is_file, is_folder
from cwdm.images import (
    ORIENTATION,
    CaseFolder,
    ClipRange,
    Image,
    Orientation,
    brain_mask,
    case_folder,
    clip_range,
    in_order_of,
    nearest_of,
    normalise,
    output_name,
    read_case,
    read_grid,
)
from cwdm.inference import VERDICTS, CaseRecord, Quality, RunRecord, error_map_paths
from cwdm.inference import read_records as read_every_record

MARGIN = 4
"""Voxels around the brain that are shown."""

SPREAD, PREDICTED_STD = "spread of samples", "predicted standard deviation"
"""What a map of the standard deviation is called: of several samples, and of one pass."""


# Records


@dataclass(frozen=True)
class Entry:
    """A case as the report knows it.

    Attributes:
        record: of the case, where it was written.
    """

    case: str
    modality: str
    failed: bool
    reason: str = ""
    warnings: tuple[str, ...] = ()
    quality: Quality | None = None
    record: CaseRecord | None = None

    @property
    def verdict(self) -> str:
        """`failed`, `reject`, `look`, `ok`, or `unchecked` where no check was recorded."""
        return "failed" if self.failed else self.quality.verdict if self.quality else "unchecked"

    @property
    def rank(self) -> int:
        """Worst first."""
        return ("failed", *VERDICTS[:-1], "unchecked", "ok").index(self.verdict)


@dataclass(frozen=True)
class Records:
    """All that a report folder tells.

    Attributes:
        entries: a case and missing modality each, worst first.
        faults: records that cannot be read, in plain words.
    """

    entries: list[Entry]
    runs: Sequence[RunRecord]
    faults: Sequence[str] = ()


def read_records(folder: Path) -> Records:
    """Read what `cwdm infer --report_path` wrote; of several runs over a case, the last counts.

    Raises:
        InputError: the folder cannot be read, or holds no record.
    """
    told = read_every_record(folder)
    entries = sorted(_merge(told.runs, told.cases), key=_worst_first)
    return Records(entries, told.runs, told.faults)


def _worst_first(entry: Entry) -> tuple[int, int, str]:
    return entry.rank, -len(entry.quality.reasons if entry.quality else ()), entry.case


def _merge(runs: Sequence[RunRecord], cases: Iterable[CaseRecord]) -> Iterable[Entry]:
    """What the runs say in the order in which they began, filled up from the records of the cases."""
    known: dict[tuple[str, str], Entry] = {}
    for outcome in (outcome for run in runs for outcome in run.cases):
        key = outcome.case, outcome.modality
        if outcome.status == "failed":
            known[key] = Entry(outcome.case, outcome.modality, True, outcome.reason)
            continue
        known.pop((outcome.case, ""), None)  # what could not be told then is told now
        before = known.get(key) if outcome.status == "skipped" else None
        quality = outcome.quality or (before and not before.failed and before.quality) or None
        known[key] = Entry(outcome.case, outcome.modality, False, "", tuple(outcome.warnings), quality)
    for record in cases:
        key = record.case, record.modality
        entry = known.get(key) or Entry(*key, failed=False)
        if not entry.failed:
            warnings = tuple(dict.fromkeys((*record.warnings, *entry.warnings)))
            entry = replace(entry, warnings=warnings, quality=record.quality or entry.quality)
        known[key] = replace(entry, record=record)
    return known.values()


# Volumes


@dataclass(frozen=True)
class ReportPaths:
    """Where volumes are looked for; what is None is where the records say it was.

    Attributes:
        data: folder of case folders.
        output: folder of synthesised files.
        truth: folder of complete case folders, or of files named like the synthesised ones.
        report: folder of the records, and of the standard deviations.
        scores: folder that `cwdm evaluate --out` filled; None: what has a true image is scored.
    """

    report: Path
    data: Path | None = None
    output: Path | None = None
    truth: Path | None = None
    scores: Path | None = None


@dataclass(frozen=True)
class CaseVolumes:
    """The volumes of a case as they are shown: (X, Y, Z) stored LPS, cropped to the brain, in [0, 1].

    Attributes:
        conditions: by their own percentiles.
        synthesis: by the range that it was written with.
        centre: the voxel through which the slices are laid: in the largest lesion, or the middle of the brain.
        oriented: whether the header says how the head lies; otherwise it is taken as stored like BraTS.
        truth, difference: by its own percentiles; the absolute difference of both images by their own percentiles.
        std: standard deviation, in units of the synthesis, and what it is called: `SPREAD` or `PREDICTED_STD`.
        tumour: what the segmentation marks, if there is one.
        notes: what else there is and cannot be shown, in plain words.
    """

    conditions: dict[str, Volume]
    synthesis: Volume
    mask: Mask
    spacing_mm: tuple[float, float, float]
    centre: tuple[int, int, int]
    oriented: bool = True
    truth: Volume | None = None
    difference: Volume | None = None
    std: Volume | None = None
    std_name: str = ""
    tumour: Mask | None = None
    notes: tuple[str, ...] = ()


def read_volumes(entry: Entry, paths: ReportPaths) -> CaseVolumes:
    """Read the volumes of a written case.

    Raises:
        CwdmError: one that is needed is not there or cannot be used.
    """
    folder = _input_folder(entry, paths)
    case = read_case(_as_given(folder, entry))
    to_lps = Orientation.to(ORIENTATION, case.affine) if case.has_orientation else Orientation.identity()
    mask = to_lps.apply(brain_mask(case.volumes.values()))
    name, volume = next(iter(case.volumes.items()))
    like = Image(volume, case.affine, case.has_orientation)
    box = bounding_box(mask if mask.any() else ~mask, MARGIN)

    def read(path: Path) -> Volume:
        return in_order_of(like, read_grid(path), case.name, (name, str(path)))

    def shown(unit: Volume) -> Volume:
        return np.ascontiguousarray(to_lps.apply(unit)[box])

    try:
        output = read(output_file(entry, paths))
        low, high = _written_range(entry, case.volumes)
        conditions = {name: shown(normalise(volume)[0]) for name, volume in case.volumes.items()}
    except ValueError as error:
        raise CaseError(case.name, str(error)) from error
    maps = zip((SPREAD, PREDICTED_STD), error_map_paths(paths.report, entry.case, entry.modality), strict=True)
    std_name, std_path = next((found for found in maps if is_file(found[1])), ("", None))
    lengths = np.linalg.norm(case.affine[:3, :3], axis=0)[list(to_lps.axes)]
    result = CaseVolumes(
        conditions=conditions,
        synthesis=shown((output - np.float32(low)) / np.float32(high - low)),
        mask=mask[box],
        spacing_mm=(float(lengths[0]), float(lengths[1]), float(lengths[2])),
        centre=_fullest(mask[box]),
        oriented=case.has_orientation,
        std=shown(read(std_path) / np.float32(high - low)) if std_path else None,
        std_name=std_name,
    )
    truth_path = truth_file(entry, paths)
    if truth_path:
        truth, synthesis = _unit(read(truth_path), shown), _unit(output, shown)
        result = replace(result, truth=truth, difference=np.abs(synthesis - truth))
    return _with_tumour(result, _segmentations(entry, truth_path, folder), lambda path: shown(read(path)) != 0)


def _with_tumour(volumes: CaseVolumes, paths: Iterable[Path], read: Callable[[Path], Mask]) -> CaseVolumes:
    """The same with the first segmentation that is there; one that cannot be used takes no image away."""
    for path in paths:
        try:
            tumour = read(path)
        except CwdmError as error:
            reason = error.reason if isinstance(error, CaseError) else error
            return replace(volumes, notes=(f"no outline of the tumour: {reason}",))
        centre = _fullest(_largest_part(tumour)) if tumour.any() else volumes.centre
        return replace(volumes, tumour=tumour, centre=centre)
    return volumes


def _unit(volume: Volume, shown: Any) -> Volume:
    """By its own percentiles; a constant image, which has none, is 0."""
    try:
        return shown(normalise(volume)[0])
    except ValueError:
        return shown(np.zeros_like(volume))


def _as_given(folder: CaseFolder, entry: Entry) -> CaseFolder:
    """The case with the contrasts that its image was made from; the folder may hold more by now."""
    given = entry.record.given if entry.record else []
    names = given or [name for name in folder.files if name != entry.modality]
    files = {name: path for name, path in folder.files.items() if name in names}
    return replace(folder, files=files, chosen=entry.modality)


def _input_folder(entry: Entry, paths: ReportPaths) -> CaseFolder:
    told = entry.record.input if entry.record else ""
    folder = paths.data / entry.case if paths.data else Path(told)
    if paths.data and not is_folder(folder):
        folder = paths.data  # flat
    try:
        found = case_folder(folder, entry.case) if told or paths.data else None
    except InputError:
        found = None
    if found is None or found.name != entry.case:  # a flat folder may hold other cases alone
        raise CaseError(entry.case, f"its input is not at {paths.data or told or 'a known place'}; give --data_path")
    return found


def output_file(entry: Entry, paths: ReportPaths) -> Path:
    """The synthesised image of a case; raises CaseError if it is not there."""
    told = entry.record.output if entry.record else ""
    path = paths.output / output_name(entry.case, entry.modality) if paths.output else Path(told)
    if not is_file(path):
        raise CaseError(
            entry.case, f"its output is not at {path if paths.output else told or 'a known place'}; give --output_path"
        )
    return path


def truth_file(entry: Entry, paths: ReportPaths) -> Path | None:
    """The true image of a case; None if there is none."""
    if paths.truth is None:
        return None
    flat = paths.truth / output_name(entry.case, entry.modality)
    if is_file(flat):
        return flat
    folder = paths.truth / entry.case
    return case_folder(folder).files.get(entry.modality) if is_folder(folder) else None


def _segmentations(entry: Entry, truth: Path | None, folder: CaseFolder) -> list[Path]:
    """The segmentations that are there, beside the true image or the input."""
    name = output_name(entry.case, "seg")
    folders = [truth.parent, folder.folder] if truth else [folder.folder]
    return [path for path in (folder / name for folder in folders) if is_file(path)]


def _written_range(entry: Entry, conditions: Mapping[str, Volume]) -> ClipRange:
    output = entry.record.settings.get("output", {}) if entry.record else {}
    if isinstance(output, dict) and output.get("intensity") == "unit":
        return ClipRange(0.0, 1.0)
    return clip_range(conditions[nearest_of(entry.modality, conditions)])


def _largest_part(mask: Mask) -> Mask:
    parts, _ = ndimage.label(mask)
    largest: Mask = parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    return largest


def _fullest(mask: Mask) -> tuple[int, int, int]:
    """Along each axis, the slice with most of the mask."""
    x, y, z = (int(np.argmax(np.count_nonzero(mask, axis=tuple({0, 1, 2} - {axis})))) for axis in range(3))
    return x, y, z
