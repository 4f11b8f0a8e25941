from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from typer.testing import CliRunner

from cwdm.cli import app
from cwdm.errors import CaseError, InputError
from cwdm.lidc import find_series, prepare, prepare_lidc, read_series

SPACING_MM = (0.8, 0.8, 2.5)


def write_series(
    folder: Path,
    hu: np.ndarray,
    patient: str = "LIDC-0001",
    skip: int = -1,
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
) -> None:
    """A CT series as a scanner writes it, (columns, rows, slices) in HU, stored LPS; the files in odd order."""
    folder.mkdir(parents=True, exist_ok=True)
    series = generate_uid()
    for k in range(hu.shape[2]):
        if k == skip:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid()
        image = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
        image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        image.Modality, image.PatientID, image.SeriesInstanceUID = "CT", patient, series
        image.ImagePositionPatient, image.ImageOrientationPatient = (
            [-100, -100, 50 + SPACING_MM[2] * k],
            list(orientation),
        )
        image.PixelSpacing = [SPACING_MM[1], SPACING_MM[0]]
        image.Rows, image.Columns = hu.shape[1], hu.shape[0]
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated = image.BitsStored = 16
        image.HighBit, image.PixelRepresentation = 15, 0
        image.RescaleSlope, image.RescaleIntercept = 1, -1024
        image.PixelData = (hu[:, :, k].T + 1024).astype(np.uint16).tobytes()
        image.save_as(folder / f"{(7 * k) % 101:03d}.dcm", enforce_file_format=True)


@pytest.fixture
def scan() -> np.ndarray:
    hu = np.random.default_rng(0).integers(-1000, 1500, (40, 30, 12))
    hu[:5] = -1024
    return hu


def test_series_comes_back_in_hounsfield_units_and_order(scan: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "dicom" / "a", scan)
    (tmp_path / "dicom" / "a" / "notes.xml").write_text("<no>image</no>")
    ((name, files),) = find_series(tmp_path / "dicom").items()
    volume, spacing_mm = read_series(name, files)
    np.testing.assert_array_equal(volume, scan)
    assert spacing_mm == pytest.approx(SPACING_MM)
    assert name.startswith("LIDC-0001-")


def test_mirrored_slices_are_brought_to_the_same_order(scan: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "dicom", scan, orientation=(-1, 0, 0, 0, -1, 0))
    ((name, files),) = find_series(tmp_path / "dicom").items()
    np.testing.assert_array_equal(read_series(name, files)[0], scan[::-1, ::-1])


def test_small_volume_is_padded_with_air_to_256(scan: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "dicom", scan)
    result = CliRunner().invoke(app, ["prepare", "lidc", str(tmp_path / "dicom"), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "out").iterdir()
    image = nib.load(path)
    voxels = np.asanyarray(image.dataobj)
    assert voxels.shape == (256, 256, 256)
    assert voxels.min() == 0
    assert voxels.max() == 1
    occupied = np.argwhere(voxels > 0)
    length_mm = occupied.max(0) - occupied.min(0) + 1
    assert length_mm == pytest.approx([35 * 0.8, 30 * 0.8, 12 * 2.5], abs=2)
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")


def test_values_and_crop_of_a_volume_of_one_millimetre() -> None:
    hu = np.random.default_rng(1).uniform(-2000, 900, (300, 20, 256)).astype(np.float32)
    upper = np.quantile(hu, 0.999)
    unit = (np.clip(hu, -1000, upper) + 1000) / (upper + 1000)
    found = prepare("ct", hu, (1.0, 1.0, 1.0))
    np.testing.assert_allclose(found[:, 118:138], unit[22:278], atol=1e-5)
    assert not found[:, :118].any()
    assert not found[:, 138:].any()


def test_bad_series_are_named_and_the_others_written(scan: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "dicom" / "good", scan, "good")
    write_series(tmp_path / "dicom" / "gap", scan, "../gap", skip=6)
    write_series(tmp_path / "dicom" / "few", scan[:, :, :3], "few")
    write_series(tmp_path / "dicom" / "side", scan, "side", orientation=(0, 1, 0, 0, 0, -1))
    faults = prepare_lidc(tmp_path / "dicom", tmp_path / "out")
    assert len(faults) == 3
    assert any("_gap" in str(fault) and "missing or doubled" in str(fault) for fault in faults)
    assert any("at least 8 slices" in str(fault) for fault in faults)
    assert all(isinstance(fault, CaseError) for fault in faults)
    assert [path.name[:5] for path in (tmp_path / "out").iterdir()] == ["good-"]


def test_damaged_pixels_are_one_clear_message(scan: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "dicom", scan)
    path = sorted((tmp_path / "dicom").iterdir())[0]
    image = pydicom.dcmread(path)
    image.PixelData = image.PixelData[:100]
    image.save_as(path)
    (fault,) = prepare_lidc(tmp_path / "dicom", tmp_path / "out")
    assert "cannot be read" in str(fault)


def test_no_series_and_output_inside_the_input_are_refused(scan: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no CT images"):
        prepare_lidc(tmp_path / "empty", tmp_path / "out")
    write_series(tmp_path / "dicom", scan)
    with pytest.raises(InputError, match="choose another folder"):
        prepare_lidc(tmp_path / "dicom", tmp_path / "dicom" / "out")
