"""A patient's scans, once it is known which modality each of them is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cwdm.arrays import Affine
from cwdm.scans.series import Series


@dataclass(frozen=True, eq=False)
class Scan:
    """One 3D image of a patient, checked, on its own grid.

    Attributes:
        modality: t1n, t1c, t2w or t2f.
        path: the image as NIfTI; of DICOM, what it was converted to, in the folder for temporary files.
        source: how its owner knows it, for messages: a path below the patient's folder, or the series.
        shape: (X, Y, Z) in voxels.
        affine: (4, 4), voxel indices to RAS mm.
        metadata: what is known of its acquisition, under the names of BIDS sidecars (`EchoTime` in s, ...).
        series: the DICOM series that it was converted from.
    """

    modality: str
    path: Path
    source: str
    shape: tuple[int, ...]
    affine: Affine
    metadata: Mapping[str, Any]
    series: Series | None = None


@dataclass(frozen=True)
class PassedOver:
    """An image of a patient's folder that is not used, and why."""

    source: str
    reason: str

    @property
    def line(self) -> str:
        """What a person is told."""
        return f"passed over {self.source}: {self.reason}"


@dataclass(frozen=True, eq=False)
class Patient:
    """A patient at one time, as far as the scans go.

    Attributes:
        name: of the folder, or sub-<label>[_ses-<label>].
        scans: modality -> scan, in the order of MODALITIES.
        passed_over: images that were not taken.
        remarks: what a person should know of those that were.
        subject: BIDS label, without `sub-`.
        session: BIDS label, without `ses-`; empty without sessions.
        dataset: the BIDS dataset that the patient belongs to, if it is one.
    """

    name: str
    scans: Mapping[str, Scan]
    passed_over: tuple[PassedOver, ...] = ()
    remarks: tuple[str, ...] = ()
    subject: str = ""
    session: str = ""
    dataset: Path | None = None


@dataclass(frozen=True)
class PatientFolder:
    """Where a patient's images are; nothing of them is read yet.

    Attributes:
        name: the patient's, by which results are named.
        folder: that of the patient or, in BIDS, of the session.
    """

    name: str
    folder: Path
    subject: str = ""
    session: str = ""
    dataset: Path | None = field(default=None)
