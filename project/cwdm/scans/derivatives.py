"""Results as BIDS derivatives: names, sidecars and the dataset's description."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cwdm import __version__
from cwdm.arrays import Volume
from cwdm.errors import CaseError
from cwdm.files import exists, output_errors, write_atomically, write_json
from cwdm.images import MARK, write_nifti
from cwdm.scans.bids import label_of
from cwdm.scans.patient import Patient, Scan

BIDS_VERSION = "1.10.1"
_LONGEST_DESCRIPTION = 79

SUFFIXES = {"t1n": "T1w", "t1c": "T1w", "t2w": "T2w", "t2f": "FLAIR"}
SPACES = {"t1n": "T1w", "t1c": "T1wGd", "t2w": "T2w", "t2f": "FLAIR"}
"""Modality -> label of the space that is its scan's own grid."""

WORDS = {
    "t1n": "T1-weighted image before contrast agent",
    "t1c": "T1-weighted image after contrast agent",
    "t2w": "T2-weighted image",
    "t2f": "T2-weighted image with fluid attenuation (FLAIR)",
}
"""What a modality is, for people."""

README = """\
# Synthesised MR images

The images in this dataset were not scanned: a network (cwdm) synthesised each of them from the other images of the
same patient. Their names hold `desc-synthetic`, and the JSON file beside each says from what and with which weights.
They are not for diagnosis.
"""


@dataclass(frozen=True)
class Provenance:
    """How a synthesised image came to be.

    Attributes:
        weights: the weights' name, with a checksum.
        inputs: modality -> scan that the network was given.
        verdict: ok, review or reject.
        remarks: what its reader should know.
        settings: what else decides the voxels: sampler, steps, seed, ...; `made_with` is for headers.
    """

    weights: str
    inputs: Mapping[str, Scan]
    verdict: str = ""
    remarks: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """One sentence."""
        return f"{MARK} {__version__} from {', '.join(self.inputs)}, weights {self.weights}"


def write_derivative(
    out: Path, patient: Patient, modality: str, volume: Volume, like: Scan, provenance: Provenance, std: bool = False
) -> Path:
    """Write a synthesised image and its sidecar into a BIDS dataset of derivatives, which is made where there is none.

    Args:
        out: the dataset.
        volume: (X, Y, Z) on the grid of `like`.
        like: the scan whose space it is in.
        std: it is the standard deviation of one.

    Returns:
        out/sub-<label>/[ses-<label>/]anat/sub-<label>[_ses-<label>][_ce-gadolinium]_space-<space>_desc-synthetic_
        <suffix>.nii.gz, or desc-std

    Raises:
        CaseError: the volume is not on that grid.
        OutputError: it cannot be written.
    """
    write_description(out, patient.dataset)
    parts = {"sub": patient.subject or label_of(patient.name), "ses": patient.session}
    folder = out.joinpath(*(f"{key}-{label}" for key, label in parts.items() if label), "anat")
    parts |= {"ce": "gadolinium" if modality == "t1c" else "", "space": SPACES[like.modality]}
    parts |= {"desc": "std" if std else "synthetic"}
    name = "_".join(f"{key}-{label}" for key, label in parts.items() if label) + f"_{SUFFIXES[modality]}"
    return write_with_sidecar(folder / name, patient, modality, volume, like, provenance, std)


def write_with_sidecar(
    name: Path, patient: Patient, modality: str, volume: Volume, like: Scan, provenance: Provenance, std: bool = False
) -> Path:
    """Write a synthesised image and its sidecar.

    Args:
        name: path of both without their endings.
        volume: (X, Y, Z) on the grid of `like`.
        std: it is the standard deviation of one.

    Returns:
        The path of the image.

    Raises:
        CaseError: the volume is not on that grid.
        OutputError: it cannot be written.
    """
    check_grid(patient.name, volume, like)
    path = name.with_name(f"{name.name}.nii.gz")
    with output_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    # The sidecar first: no image without the word that it is synthetic.
    write_json(name.with_name(f"{name.name}.json"), _sidecar(patient, modality, like, provenance, std))
    stored = volume.astype(np.float32) if std else as_stored(volume)
    made_with = "" if std else provenance.settings.get("made_with", "")
    write_nifti(path, stored, like.affine, description_of(f"{modality}{', std' * std}", made_with))
    return path


def description_of(what: str, made_with: str = "") -> str:
    """What the header of a synthesised image says, cut where it has no room.

    Args:
        what: its modality.
        made_with: stays whole, for it is compared with.
    """
    behind = f", {made_with}" if made_with else ""
    return f"{MARK} {__version__} ({what})"[: _LONGEST_DESCRIPTION - len(behind)] + behind


def write_description(out: Path, source: Path | None) -> None:
    """Write dataset_description.json and README.md where they are not there yet.

    Args:
        source: the BIDS dataset that the derivatives are of, if they are of one.
    """
    description: dict[str, Any] = {
        "Name": "Synthesised MR images",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "cwdm", "Version": __version__}],
    }
    if source is not None:
        link = Path(os.path.relpath(source, out)).as_posix()
        description["DatasetLinks"] = {"raw": link}
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if not exists(path := out / "dataset_description.json"):
            write_json(path, description)
        if not exists(path := out / "README.md"):
            write_atomically(path, lambda file: file.write(README.encode()))


def check_grid(patient: str, volume: Volume, like: Scan) -> None:
    """Refuse a volume that is not of a scan's size."""
    if volume.shape != like.shape:
        found, expected = ("×".join(map(str, shape)) for shape in (volume.shape, like.shape))
        raise CaseError(patient, f"the volume has {found} voxels, expected {expected}, those of {like.source}")


def as_stored(volume: Volume) -> np.ndarray:
    """Intensities as integers where they are scanner-like, which loses nothing that a scanner would keep."""
    high, low = float(volume.max()), float(volume.min())
    if 200 <= high <= np.iinfo(np.int16).max and low >= 0:
        return np.rint(volume).astype(np.int16)
    return volume.astype(np.float32)


def _sidecar(patient: Patient, modality: str, like: Scan, provenance: Provenance, std: bool = False) -> dict[str, Any]:
    what = f"Standard deviation of the synthesised {WORDS[modality]}" if std else f"{WORDS[modality]}, synthesised"
    sidecar: dict[str, Any] = {
        "Description": f"{what}, not scanned; not for diagnosis",
        "Synthesised": True,
        "SkullStripped": True,
        "SynthesisedModality": modality,
        "Inputs": {name: scan.source for name, scan in provenance.inputs.items()},
        "SpatialReference": like.source,
        "Weights": provenance.weights,
        "Verdict": provenance.verdict,
        "Remarks": list(provenance.remarks),
        "Settings": dict(provenance.settings),
        "GeneratedBy": [{"Name": "cwdm", "Version": __version__}],
    }
    if patient.dataset is not None:
        sidecar["Sources"] = [f"bids:raw:{scan.source}" for scan in provenance.inputs.values()]
        sidecar["SpatialReference"] = f"bids:raw:{like.source}"
    return sidecar
