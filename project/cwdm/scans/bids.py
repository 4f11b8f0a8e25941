"""BIDS datasets: where subjects' anatomical images are, and what the metadata that they inherit say."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cwdm.files import is_file, is_folder, matching
from cwdm.images import has_nifti_name
from cwdm.scans.patient import PatientFolder
from cwdm.scans.volume import read_sidecar, stem

_LABEL = re.compile(r"(sub|ses)-([A-Za-z0-9]+)")
SUFFIXES = {"T1w", "T2w", "FLAIR"}


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a BIDS dataset, by its description or by what lies in it."""
    if is_file(folder / "dataset_description.json"):
        return True
    subjects = [entry for entry in folder.iterdir() if entry.name.startswith("sub-") and is_folder(entry)]
    return any(is_folder(entry / "anat") or any(matching(entry, "ses-*/anat")) for entry in subjects)


def find_sessions(dataset: Path) -> list[PatientFolder]:
    """The sessions of all subjects with anatomical images; subjects without sessions count as one."""
    found = []
    for subject in _labelled(dataset, "sub"):
        for session in _labelled(subject, "ses") or [subject]:
            if is_folder(session / "anat"):
                alone = session == subject
                name = subject.name if alone else f"{subject.name}_{session.name}"
                label = "" if alone else _label(session)
                found.append(PatientFolder(name, session, _label(subject), label, dataset))
    return found


def images(session: Path) -> list[Path]:
    """The anatomical images of a session."""
    return sorted(path for path in (session / "anat").iterdir() if has_nifti_name(path.name))


def suffix(path: Path) -> str:
    """What BIDS calls the kind of an image."""
    return stem(path.name).rpartition("_")[2]


def entities(name: str) -> dict[str, str]:
    """Entity -> label, of a file's name without its ending."""
    pairs = (part.partition("-") for part in name.split("_"))
    return {key: label for key, dash, label in pairs if dash}


def inherited_fields(path: Path, dataset: Path) -> Mapping[str, Any]:
    """Metadata of an image: of the sidecars above it that apply to it, and of its own, which holds over them."""
    own, kind = entities(stem(path.name)), suffix(path)
    fields: dict[str, Any] = {}
    levels = [path.parent, *path.parent.parents]
    for level in reversed(levels[: levels.index(dataset) + 1] if dataset in levels else levels[:1]):
        sidecars = [
            other
            for other in matching(level, f"*{kind}.json")
            if other.stem.rpartition("_")[2] == kind and entities(other.stem).items() <= own.items()
        ]
        for sidecar in sorted(sidecars, key=lambda other: (len(entities(other.stem)), other.name)):
            fields |= read_sidecar(sidecar)
    return fields


def label_of(name: str) -> str:
    """A name as a BIDS label: letters and digits alone."""
    return re.sub(r"[^A-Za-z0-9]", "", name) or "unnamed"


def _labelled(folder: Path, kind: str) -> list[Path]:
    return sorted(
        entry
        for entry in folder.iterdir()
        if (match := _LABEL.fullmatch(entry.name)) and match[1] == kind and is_folder(entry)
    )


def _label(folder: Path) -> str:
    return folder.name.partition("-")[2]
