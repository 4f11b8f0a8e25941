"""The images in a patient's folder with all that names them, not named yet."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cwdm.errors import CaseError
from cwdm.images import has_nifti_name
from cwdm.scans import bids
from cwdm.scans.headers import dicom_files, walk
from cwdm.scans.naming import has_weighting, is_of_acquisition
from cwdm.scans.patient import PassedOver, PatientFolder
from cwdm.scans.series import Series, find_series
from cwdm.scans.volume import fields_beside, stem


@dataclass(frozen=True, eq=False)
class FoundImage:
    """An image of a patient: a NIfTI file or a DICOM series.

    Attributes:
        source: how its owner knows it.
        texts: name and descriptions, for naming.
        fields: of header or sidecar.
        names: what a table may call it.
        path: of a NIfTI file.
        series: of DICOM.
    """

    source: str
    texts: tuple[str, ...]
    fields: Mapping[str, Any]
    names: tuple[str, ...]
    path: Path | None = None
    series: Series | None = None


def images_of(patient: PatientFolder) -> tuple[list[FoundImage], list[PassedOver]]:
    """The images of a patient, and those that are passed over at first sight.

    Raises:
        CaseError: they are several patients' or of several days, or the folder cannot be read.
    """
    try:
        if patient.dataset is not None:
            return _of_bids(patient, patient.dataset)
        nifti = _of_nifti_files(patient)
        series, passed = _of_dicom(patient)
    except OSError as error:
        raise CaseError(patient.name, f"{patient.folder} cannot be read: {error.strerror}") from error
    return nifti + series, passed


def _of_bids(patient: PatientFolder, dataset: Path) -> tuple[list[FoundImage], list[PassedOver]]:
    found, passed = [], []
    for path in bids.images(patient.folder):
        source = path.relative_to(dataset).as_posix()
        if (kind := bids.suffix(path)) not in bids.SUFFIXES:
            passed.append(PassedOver(source, f"its suffix is {kind}, none of {', '.join(sorted(bids.SUFFIXES))}"))
            continue
        fields = bids.inherited_fields(path, dataset)
        texts = (stem(path.name), *_descriptions(fields)[:1])
        found.append(FoundImage(source, texts, fields, (source, path.name, stem(path.name)), path))
    return found, passed


def _of_nifti_files(patient: PatientFolder) -> list[FoundImage]:
    paths = [path for path in walk(patient.folder) if has_nifti_name(path.name)]
    names = _without_common_start([stem(path.name) for path in paths])
    fields = [fields_beside(path) for path in paths]
    _check_one_owner(patient, paths, fields)
    found = []
    for path, name, own in zip(paths, names, fields, strict=True):
        source = path.relative_to(patient.folder).as_posix()
        texts = (name, *_descriptions(own, bool(has_weighting(name))))
        found.append(FoundImage(source, texts, own, (source, path.name, stem(path.name)), path))
    return found


def _of_dicom(patient: PatientFolder) -> tuple[list[FoundImage], list[PassedOver]]:
    there = find_series(dicom_files(patient.folder))
    scanned = [one for one in there.series if one.fields.get("Modality", "MR") == "MR"]
    if len(people := {one.patient for one in scanned}) > 1:
        names = "; ".join(f"'{identity}' {name}" for identity, name in sorted(people)[:3])
        raise CaseError(patient.name, f"mixed patients: its DICOM files are of {len(people)} ({names}); part them")
    if len(days := {one.study for one in scanned}) > 1:
        listed = ", ".join(sorted(days)[:3])
        raise CaseError(patient.name, f"its DICOM files are of {len(days)} studies ({listed}); give each a folder")
    in_folder = Counter(one.files[0].parent for one in there.series)
    passed = [
        PassedOver(f"{len(files)} DICOM files ({files[0].relative_to(patient.folder)}, ...)", reason)
        for files, reason in (
            (there.doubled, "copies of images that are there already"),
            (there.damaged, "no image can be read from their headers"),
        )
        if files
    ]
    found = []
    for one in there.series:
        texts = _descriptions(one.fields)
        folder = one.files[0].parent
        if not any(map(has_weighting, texts)) and in_folder[folder] == 1 and folder != patient.folder:
            texts = [*texts, folder.name]
        called = (str(one.number), one.description, one.uid)
        found.append(FoundImage(one.label, tuple(texts), one.fields, called, series=one))
    return found, passed


def _descriptions(fields: Mapping[str, Any], named: bool = False) -> list[str]:
    """Description and, where neither it nor the name says a weighting, protocol: which some use for the whole visit."""
    description, protocol = (str(fields.get(key, "")) for key in ("SeriesDescription", "ProtocolName"))
    own = [description] if description else []
    return own if named or has_weighting(description) or not protocol else [*own, protocol]


def _without_common_start(names: Sequence[str]) -> list[str]:
    """The names without the words that all begin with, which are the patient's, up to the first that is a weighting."""
    split = [re.findall(r"[^-_. ]+[-_. ]*", name) for name in names]
    shared = 0
    for words in zip(*split, strict=False):
        if len(names) < 2 or len(set(words)) > 1 or has_weighting(words[0]):
            break
        shared += 1
    return ["".join(words[shared:]) or name for words, name in zip(split, names, strict=True)]


def _check_one_owner(patient: PatientFolder, paths: Sequence[Path], fields: Sequence[Mapping[str, Any]]) -> None:
    """Refuse files that say, in sidecars or as `<patient>_t1.nii.gz` does, that they are of several patients."""
    owners: dict[str, Path] = {}
    for path, own in zip(paths, fields, strict=True):
        if owner := str(own.get("PatientID") or "").strip() or _owner(stem(path.name)):
            owners.setdefault(owner.casefold(), path)
    if len(owners) > 1:
        first, second = list(owners.values())[:2]
        raise CaseError(
            patient.name,
            f"mixed patients: {first.name} and {second.name} do not seem to be of one; give each patient a folder, or "
            "let the names of one patient's files begin alike",
        )


def _owner(name: str) -> str:
    """What stands before the weighting where a file is called <patient>_<weighting>, without words of acquisition."""
    if labels := bids.entities(name):
        return labels.get("sub", "")
    *before, last = re.split(r"[-_. ]+", name)
    if not has_weighting(last) or any(map(has_weighting, before)):
        return ""
    # Numbers of series, as converters write in front, are no patients.
    return "_".join(word for word in before if not is_of_acquisition(word) and not re.fullmatch(r"\d{1,4}|\w", word))
