"""A synthesised volume as a derived DICOM series, which a viewer opens beside the series that it belongs to.

Whose and where it is comes from the source, slice by slice: patient, study, frame of reference, geometry. How it was
acquired does not, because it was not; nor do private attributes. Source: DICOM PS3.3, A.4 (MR Image), C.7.6.1 (derived
images) and C.8.3.1.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cwdm import __version__
from cwdm.arrays import Affine, Volume
from cwdm.errors import CaseError, NameInUseError, needs_extra
from cwdm.files import exists, output_errors
from cwdm.images import Image, in_order_of
from cwdm.scans.derivatives import WORDS, Provenance, check_grid
from cwdm.scans.headers import frames_of
from cwdm.scans.patient import Scan
from cwdm.scans.volume import RAS_LPS

with needs_extra("scans", "DICOM"):
    import pydicom
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

SERIES_OFFSET = 9000
"""What is added to the number of the source's series, so that scanned series keep theirs."""

_COPIED = (
    *("SpecificCharacterSet", "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex"),
    *("PatientAge", "PatientSize", "PatientWeight", "PatientIdentityRemoved", "DeidentificationMethod"),
    *("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID"),
    *("StudyDescription", "AccessionNumber", "ReferringPhysicianName", "FrameOfReferenceUID"),
    *("PositionReferenceIndicator", "PatientPosition", "BodyPartExamined", "Laterality", "MagneticFieldStrength"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("SliceLocation", "Rows", "Columns", "InstanceNumber"),
)
_NEEDED_EMPTY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator", "PatientPosition", "InstanceNumber"),
    "Laterality",
)
"""What every image must have, if only without a value."""

Source = dict[str, Any]


def write_derived_series(
    out: Path, patient: str, modality: str, volume: Volume, like: Scan, provenance: Provenance
) -> list[Path]:
    """Write a volume as a DICOM series of its own, a file a slice; the same voxels give the same files.

    Args:
        out: a folder that is not there yet; appears whole or not at all.
        patient: for messages.
        volume: (X, Y, Z) on the grid of `like`, scanner-like intensities.
        like: a scan that came from DICOM.

    Raises:
        CaseError: `like` did not come from DICOM, or the volume is not on its grid.
        OutputError: the folder exists already or cannot be written.
    """
    check_grid(patient, volume, like)
    if like.series is None:
        raise CaseError(patient, f"{like.source} did not come from DICOM, so no DICOM series can be derived from it")
    if exists(out):
        raise NameInUseError(f"cannot write {out}: it is there already; move it away")
    sources = _sources(patient, like)
    planes = _planes(patient, volume, like, sources)
    pixels, slope = _pixels(planes)
    entropy = [like.series.uid, modality, hashlib.sha256(pixels.tobytes()).hexdigest(), repr(slope)]
    common = _common(modality, provenance, like, pixels, slope)
    common.SeriesInstanceUID = generate_uid(entropy_srcs=[*entropy, "series"])
    with output_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".cwdm-", dir=out.parent) as hidden:
            made = Path(hidden, "series")
            made.mkdir()
            for k, source in enumerate(sources):
                uid = generate_uid(entropy_srcs=[*entropy, str(k)])
                _image(common, source, uid, pixels[k]).save_as(made / f"{k + 1:04d}.dcm", enforce_file_format=True)
            made.rename(out)
    return sorted(out.iterdir())


def _sources(patient: str, like: Scan) -> list[Source]:
    """Keyword -> value for each slice of the source."""
    assert like.series is not None
    try:
        files = {path: frames_of(pydicom.dcmread(path, stop_before_pixels=True)) for path in like.series.files}
        sources = [dict(files[path][frame]) for path, frame in like.series.slices]
    except Exception as error:  # the files were read before; what can befall them since then has no end
        raise CaseError(patient, f"{like.source}: its DICOM files cannot be read any more ({error})") from error
    if len(files) == 1:  # slices of one file have one number
        for number, ((_, frame), source) in enumerate(zip(like.series.slices, sources, strict=True), 1):
            source |= {"InstanceNumber": number, "ReferencedFrameNumber": frame + 1}
    return sources


def _planes(patient: str, volume: Volume, like: Scan, sources: list[Source]) -> Volume:
    """The volume as (slices, rows, columns) of the source."""
    shape = int(sources[0]["Columns"]), int(sources[0]["Rows"]), len(sources)
    grid = Image(np.empty(shape, np.float32), _affine(sources), oriented=True)
    names = like.source, "the synthesised volume"
    return np.ascontiguousarray(in_order_of(grid, Image(volume, like.affine, True), patient, names).transpose(2, 1, 0))


def _affine(sources: list[Source]) -> Affine:
    """(column, row, slice) -> RAS mm; PS3.3, equation C.7.6.2.1-1."""
    first, last = (np.array(one["ImagePositionPatient"], float) for one in (sources[0], sources[-1]))
    across, down = np.array(sources[0]["ImageOrientationPatient"], float).reshape(2, 3)
    rows_mm, columns_mm = (float(value) for value in sources[0]["PixelSpacing"])
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = across * columns_mm, down * rows_mm
    affine[:3, 2], affine[:3, 3] = (last - first) / (len(sources) - 1), first
    return RAS_LPS @ affine


def _pixels(planes: Volume) -> tuple[np.ndarray, float]:
    """Stored values and what they are multiplied by; 1 where intensities are scanner-like."""
    high = float(planes.max())
    slope = 1.0 if 200 <= high <= 32767 else max(high, 1e-6) / 32767
    slope = float(f"{slope:.8g}")  # as the header can hold it
    return np.clip(np.rint(planes / slope), 0, 65535).astype(np.uint16), slope


def _common(modality: str, provenance: Provenance, like: Scan, pixels: np.ndarray, slope: float) -> Dataset:
    """Attributes that all slices share, without those of the source."""
    assert like.series is not None
    low, high = (float(x) * slope for x in np.percentile(pixels[pixels > 0] if pixels.any() else pixels, (1, 99)))
    common = Dataset()
    common.SOPClassUID = MRImageStorage
    common.Modality = "MR"
    common.ImageType = ["DERIVED", "SECONDARY", "OTHER", "SYNTHETIC"]
    common.SeriesNumber = SERIES_OFFSET + like.series.number % 1000
    common.SeriesDescription = f"SYNTHETIC {modality.upper()} (cwdm)"
    common.DerivationDescription = f"{WORDS[modality]}, {provenance.line}"[:1024]
    common.ImageComments = "SYNTHETIC: not scanned, not for diagnosis"
    common.Manufacturer, common.ManufacturerModelName, common.SoftwareVersions = "cwdm", "cwdm", __version__
    common.BurnedInAnnotation = "NO"
    common.LossyImageCompression = "00"
    # Not acquired by any sequence: research mode, without timings.
    common.ScanningSequence, common.SequenceVariant, common.ScanOptions = "RM", "NONE", ""
    common.MRAcquisitionType = common.EchoTime = common.RepetitionTime = common.EchoTrainLength = None
    common.SamplesPerPixel, common.PhotometricInterpretation = 1, "MONOCHROME2"
    common.BitsAllocated = common.BitsStored = 16
    common.HighBit, common.PixelRepresentation = 15, 0
    if slope != 1:
        common.RescaleSlope, common.RescaleIntercept, common.RescaleType = slope, 0, "US"
    common.WindowCenter, common.WindowWidth = f"{(low + high) / 2:.6g}", f"{max(high - low, 1):.6g}"
    return common


def _image(common: Dataset, source: Source, uid: str, plane: np.ndarray) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    for name in _COPIED:
        if name in source:
            setattr(image, name, source[name])
    for name in _NEEDED_EMPTY:
        if name not in image:
            setattr(image, name, None)
    image.update(common)
    image.SOPInstanceUID = uid
    image.SourceImageSequence = [_reference(source)]
    image.PixelData = plane.astype("<u2").tobytes()
    return image


def _reference(source: Source) -> Dataset:
    """The slice that a derived one belongs to."""
    purpose = Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator = "121322", "DCM"
    purpose.CodeMeaning = "Source image for image processing operation"
    reference = Dataset()
    reference.ReferencedSOPClassUID = source.get("SOPClassUID", MRImageStorage)
    reference.ReferencedSOPInstanceUID = source["SOPInstanceUID"]
    if frame := source.get("ReferencedFrameNumber"):
        reference.ReferencedFrameNumber = frame
    reference.PurposeOfReferenceCodeSequence = [purpose]
    return reference
