"""What is written of a patient: a folder that appears whole or not at all, by which a later run knows what is done."""

from collections.abc import Iterable
from pathlib import Path

from cwdm import __version__
from cwdm.errors import CaseError, InputError
from cwdm.files import exists, files_below, is_file, output_errors, write_atomically
from cwdm.images import output_name, read_description, write_nifti
from cwdm.scans.back import write_transforms
from cwdm.scans.derivatives import as_stored, description_of, write_derivative, write_description, write_with_sidecar
from cwdm.scans.derived_series import write_derived_series
from cwdm.scans.patient import Patient, PatientFolder
from cwdm.scans.steps import InSpace, Synthetic

PREPARED = "prepared by cwdm"
"""How the description begins in the header of what is prepared here."""

ATLAS = "atlas"
"""Folder beside a patient's images for the case in the space."""


def place_of(patient: PatientFolder | Patient) -> Path:
    """A patient's folder inside the output folder; that of a session of a BIDS dataset has the names of BIDS."""
    if patient.dataset is None:
        return Path(patient.name)
    return Path(f"sub-{patient.subject}", *([f"ses-{patient.session}"] if patient.session else []))


def is_finished(place: Path, mark: str) -> bool:
    """Whether a patient's folder is there already.

    Args:
        mark: how the description in the header of its images begins.

    Raises:
        InputError: something else has the name.
    """
    if not exists(place):
        return False
    images = [path for path in files_below(place) if path.name.endswith(".nii.gz")]
    if any(read_description(path).startswith(mark) for path in images):
        return True
    raise InputError(f"{place} is there and was not made by cwdm; move it away or choose another output folder")


def write_dataset(out: Path, patients: Iterable[PatientFolder], with_atlas: bool) -> None:
    """What a dataset of BIDS derivatives needs beside its patients; nothing where they come from no BIDS dataset."""
    datasets = {patient.dataset for patient in patients} - {None}
    if not datasets:
        return
    write_description(out, datasets.pop())
    ignored = out / ".bidsignore"
    if with_atlas and not is_file(ignored):
        # No slash behind the name: the validator asks for the folder without one.
        write_atomically(ignored, lambda file: file.write(f"**/{ATLAS}\n".encode()))


def write_synthetic(root: Path, scans: InSpace, made: Iterable[Synthetic], dicom: bool, with_atlas: bool) -> None:
    """Write the synthesised images of a patient, with sidecars, on the grids of the scans that they are like.

    Args:
        root: an empty folder in place of the output folder.
        dicom: write a derived DICOM series of each too.
        with_atlas: write the case in the space, and the transforms, too.

    Raises:
        CaseError: the scan did not come from DICOM.
        OutputError: they cannot be written.
    """
    patient = scans.patient
    folder = root / place_of(patient)
    for one in made:
        like = patient.scans[one.like]
        _write_images(root, patient, one)
        if dicom:
            series = folder / f"{patient.name}-{one.modality}-dicom"
            write_derived_series(series, patient.name, one.modality, one.image.volume, like, one.provenance)
    if with_atlas:
        atlas = folder / ATLAS
        write_case(atlas, scans, transforms=True)
        for one in made:
            path = atlas / output_name(patient.name, one.modality)
            stored = as_stored(one.synthesis.volume)
            description = description_of(one.modality, one.provenance.settings["made_with"])
            write_nifti(path, stored, scans.aligned.space.affine, description)


def _write_images(root: Path, patient: Patient, one: Synthetic) -> None:
    like, folder = patient.scans[one.like], root / place_of(patient)
    for image, std in ((one.image, False), (one.std, True)):
        if image is None:
            continue
        if patient.dataset is not None:
            write_derivative(root, patient, one.modality, image.volume, like, one.provenance, std)
        else:
            name = folder / f"{patient.name}-{one.modality}{'-std' * std}"
            write_with_sidecar(name, patient, one.modality, image.volume, like, one.provenance, std)


def write_case(folder: Path, scans: InSpace, transforms: bool = False) -> None:
    """Write a patient's scans in the space as a case folder: stripped, registered, <name>-<modality>.nii.gz.

    Args:
        transforms: write how they came there too, as ITK files.

    Raises:
        OutputError: it cannot be written.
    """
    name, space = scans.patient.name, scans.aligned.space
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if transforms:
        write_transforms(scans.aligned, folder / "transforms", name)
    for modality, volume in scans.volumes.items():
        description = f"{PREPARED} {__version__} ({modality}, {space.name})"
        write_nifti(folder / output_name(name, modality), as_stored(volume), space.affine, description)


def check_possible(patient: Patient, grid: str, dicom: bool) -> None:
    """Refuse what cannot be written of a patient before hours are spent on it.

    Raises:
        CaseError: there is no scan with that grid, or it did not come from DICOM.
    """
    if grid and grid not in patient.scans:
        raise CaseError(patient.name, f"--grid {grid}: only {', '.join(patient.scans)} are there")
    sources = [patient.scans[grid]] if grid else list(patient.scans.values())
    if dicom and all(scan.series is None for scan in sources):
        named = ", ".join(scan.source for scan in sources)
        raise CaseError(patient.name, f"--dicom: {named} did not come from DICOM, so no series can be derived")
