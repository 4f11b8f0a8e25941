"""Patients among scans, and which of their images is which modality.

A patient is a folder of NIfTI files, a folder of DICOM series, or a session of a BIDS dataset. Patients are read one
by one, so that a bad one takes no other down.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from cwdm.errors import CaseError, InputError
from cwdm.files import is_folder
from cwdm.images import MODALITIES, has_nifti_name, list_folder
from cwdm.scans import bids
from cwdm.scans.convert import convert_series
from cwdm.scans.headers import dicom_files, is_dicom, study_of, walk
from cwdm.scans.images_of import FoundImage, images_of
from cwdm.scans.naming import Naming, name_image
from cwdm.scans.patient import PassedOver, Patient, PatientFolder, Scan
from cwdm.scans.table import SKIP, ModalityTable, Row, match
from cwdm.scans.volume import digest, fields_beside, read_scan

_TABLE = "say it in a table: --modalities TABLE.csv with the columns patient, scan, modality"
_log = logging.getLogger(__name__)


def find_patients(scans: Path) -> list[PatientFolder]:
    """The patients in a folder, by name; no image is read.

    They are the sessions of a BIDS dataset, the folders in it, or, where it holds NIfTI files, DICOM files or the DICOM
    series of one study itself, the folder, with all that lies below it in either format.

    Raises:
        InputError: the folder is missing, not readable, or holds no image.
    """
    entries = [entry for entry in list_folder(scans, "scans", "input ") if not entry.name.startswith(".")]
    scans = scans.absolute()
    if bids.is_dataset(scans):
        if not (sessions := bids.find_sessions(scans)):
            raise InputError(f"no subject with anatomical images (sub-<label>/[ses-<label>/]anat) in {scans}")
        return sessions
    folders = [scans / entry.name for entry in entries if is_folder(entry)]
    if any(has_nifti_name(entry.name) for entry in entries) or _one_study(scans, folders):
        return [PatientFolder(scans.name, scans, bids.label_of(scans.name))]
    patients = [folder for folder in folders if _has_images(folder)]
    if others := [entry.name for entry in entries if scans / entry.name not in patients]:
        _log.warning("passed over, no folders with images: %s", ", ".join(others))
    if not patients:
        raise InputError(f"no images found in {scans}; expected folders of NIfTI files or DICOM series, or BIDS")
    return [PatientFolder(folder.name, folder, bids.label_of(folder.name)) for folder in patients]


def read_patient(found: PatientFolder, work: Path, table: ModalityTable | None = None) -> Patient:
    """A patient's scans, each checked and as NIfTI.

    Args:
        found: one of `find_patients`.
        work: an empty folder for what is converted from DICOM; must stay as long as the patient is used.
        table: what a person said about the images.

    Raises:
        CaseError: an image is ambiguous or unsuited, or there is none.
        InputError: there are far too many files.
    """
    images, passed = images_of(found)
    rows = (table or ModalityTable()).rows_of(found.name)
    named, also_passed = _named(found.name, images, rows)
    chosen, duplicates = _one_each(found.name, named)
    passed += also_passed + duplicates
    if not chosen:
        looked = "; ".join(one.line for one in passed[:6]) or "there are no images"
        raise CaseError(found.name, f"no image is one of {', '.join(MODALITIES)}: {looked}; or {_TABLE}")
    loaded = [_load(found.name, modality, image, work) for modality, image in chosen.items()]
    _check_different(found.name, loaded)
    scans = MappingProxyType({scan.modality: scan for scan, _ in loaded})
    remarks = _remarks(chosen, named)
    return Patient(found.name, scans, tuple(passed), remarks, found.subject, found.session, found.dataset)


# Naming


def _named(
    patient: str, images: Iterable[FoundImage], rows: list[Row]
) -> tuple[list[tuple[FoundImage, Naming]], list[PassedOver]]:
    """Every image that is one of the modalities, and the others with the reason."""
    named, passed, conflicts = [], [], []
    unused = {row for row in rows if row.patient and "*" not in row.scan}
    for image in images:
        if row := match(rows, image.names):
            unused.discard(row)
            naming = Naming(reason="the table says so") if row.modality == SKIP else Naming(row.modality)
        else:
            naming = name_image(image.texts, image.fields)
        if naming.conflict:
            conflicts.append(f"{image.source} ({naming.conflict})")
        elif naming.modality:
            named.append((image, naming))
        else:
            passed.append(PassedOver(image.source, naming.reason or "nothing tells its modality"))
    if unused:
        row = min(unused, key=lambda row: row.line)
        raise CaseError(patient, f"line {row.line} of the table names {row.scan!r}, which is not among its images")
    if conflicts:
        raise CaseError(patient, f"ambiguous: {'; '.join(conflicts[:4])}; {_TABLE}")
    return named, passed


def _one_each(patient: str, named: list[tuple[FoundImage, Naming]]) -> tuple[dict[str, FoundImage], list[PassedOver]]:
    """Modality -> its one image, and the duplicates."""
    chosen: dict[str, FoundImage] = {}
    passed: list[PassedOver] = []
    _check_one_format(patient, named)
    for modality in MODALITIES:
        group = [(image, naming) for image, naming in named if naming.modality == modality]
        if len(group) > 1:
            group, copies = _without_copies(patient, group)
            passed += copies
        if len(group) > 1:
            raise CaseError(patient, _why_ambiguous(modality, group))
        if group:
            chosen[modality] = group[0][0]
    return chosen, passed


def _check_one_format(patient: str, named: list[tuple[FoundImage, Naming]]) -> None:
    """Refuse modalities that are there as NIfTI and as DICOM, which may be the same and may not; all in one message."""
    groups = {modality: [image for image, naming in named if naming.modality == modality] for modality in MODALITIES}
    twice = [modality for modality, group in groups.items() if len({image.series is None for image in group}) > 1]
    if twice:
        which = ", ".join(twice)
        examples = " and ".join(image.source for image in groups[twice[0]])
        remedy = f"take the NIfTI files or the DICOM series away, or {_TABLE}"
        are = "is" if len(twice) == 1 else "are"
        raise CaseError(patient, f"{which} {are} there as NIfTI and as DICOM (such as {examples}); {remedy}")


def _without_copies(
    patient: str, group: list[tuple[FoundImage, Naming]]
) -> tuple[list[tuple[FoundImage, Naming]], list[PassedOver]]:
    """The images of a group without those whose voxels another one holds too."""
    first: dict[str, FoundImage] = {}
    kept, passed = [], []
    for image, naming in group:
        if image.path is not None:
            voxels = digest(read_scan(patient, image.source, image.path))
            if (same := first.setdefault(voxels, image)) is not image:
                passed.append(PassedOver(image.source, f"a copy of {same.source}"))
                continue
        kept.append((image, naming))
    return kept, passed


def _remarks(chosen: Mapping[str, FoundImage], named: Iterable[tuple[FoundImage, Naming]]) -> tuple[str, ...]:
    """That a T1 is before contrast agent is only certain where something says so, or another one is after it."""
    silent = any(image is chosen.get("t1n") and not naming.said for image, naming in named)
    if silent and "t1c" not in chosen:
        return (
            f"{chosen['t1n'].source} is taken for t1n: nothing says that contrast agent was given, or that none was",
        )
    return ()


def _why_ambiguous(modality: str, group: list[tuple[FoundImage, Naming]]) -> str:
    sources = " and ".join(image.source for image, _ in group)
    if modality == "t1n" and not all(naming.said for _, naming in group):
        return f"{len(group)} T1 of which none says whether contrast agent was given ({sources}); {_TABLE}"
    return f"{len(group)} images are {modality} ({sources}); take the others away or skip them: {_TABLE}"


# Reading


def _load(patient: str, modality: str, image: FoundImage, work: Path) -> tuple[Scan, str]:
    """A scan, converted if it is DICOM, and what tells its voxels from others'."""
    path, fields = image.path, dict(image.fields)
    if image.series is not None:
        if image.series.problem:
            raise CaseError(patient, f"{image.source}: {image.series.problem}")
        path = convert_series(patient, image.series, work)
        fields |= fields_beside(path)
    assert path is not None
    read = read_scan(patient, image.source, path)
    series = image.series
    if series is not None and len(series.slices) not in read.volume.shape:
        raise CaseError(
            patient,
            f"{image.source}: {len(series.slices)} slices became {'×'.join(map(str, read.volume.shape))} voxels; "
            "convert it by hand and give the NIfTI file",
        )
    scan = Scan(modality, path, image.source, read.volume.shape, read.affine, MappingProxyType(fields), series)
    return scan, digest(read)


def _check_different(patient: str, loaded: list[tuple[Scan, str]]) -> None:
    """Refuse the same voxels under two names."""
    seen: dict[str, Scan] = {}
    for scan, voxels in loaded:
        if (first := seen.setdefault(voxels, scan)) is not scan:
            raise CaseError(
                patient,
                f"{first.source} ({first.modality}) and {scan.source} ({scan.modality}) hold the same voxels; one of "
                "them has the wrong name or was copied from the wrong file",
            )


# Folders


def _has_images(folder: Path) -> bool:
    return any(has_nifti_name(path.name) for path in walk(folder)) or any(True for _ in dicom_files(folder))


def _one_study(scans: Path, folders: list[Path]) -> bool:
    """Whether a folder holds DICOM files itself, or its folders are the series of one study."""
    if any(map(is_dicom, scans.iterdir())):
        return True
    studies = [study for folder in folders if (study := study_of(folder))]
    return len(studies) > 1 and len(set(studies)) == 1
