import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy import ndimage
from typer.testing import CliRunner

from cwdm.checkpoint import Record
from cwdm.cli.app import app
from cwdm.errors import InputError
from cwdm.images import write_nifti
from cwdm.prepare.lidc import LAS, find_series, prepare, prepare_lidc, read_series
from cwdm.training.cases import find_subjects
from cwdm.training.settings import DataSettings
from cwdm.training.volumes import decode

SPACING_MM = (0.8, 0.8, 2.5)


def write_series(
    folder: Path,
    hu: np.ndarray,
    patient: str = "LIDC-0001",
    skip: int = -1,
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
) -> None:
    """A CT series as a scanner writes it, (columns, rows, slices) in HU, running to the left, the back and upwards."""
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
    np.testing.assert_array_equal(volume, scan[:, ::-1])  # LAS
    assert spacing_mm == pytest.approx(SPACING_MM)
    assert name.startswith("LIDC-0001-")


def test_mirrored_slices_are_brought_to_the_same_order(scan: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "dicom", scan, orientation=(-1, 0, 0, 0, -1, 0))
    ((name, files),) = find_series(tmp_path / "dicom").items()
    np.testing.assert_array_equal(read_series(name, files)[0], scan[::-1])


def test_small_volume_is_padded_with_air_to_256_and_says_so(scan: np.ndarray, tmp_path: Path) -> None:
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
    assert nib.aff2axcodes(image.affine) == ("L", "A", "S")
    description = image.header["descrip"].item().decode()
    assert re.fullmatch(r"CT, \[0, 1\] is -1000 to \d+ HU, padded from 32x24x30", description)
    assert "padded from 32x24x30" in " ".join(result.output.split())


def centred_on_mm(volume: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """The outermost voxels' centres stay, and in between stand as many samples of cubic splines as there are mm."""
    steps = [np.linspace(0, n - 1, round(n * mm)) for n, mm in zip(volume.shape, spacing_mm, strict=True)]
    return ndimage.map_coordinates(volume, np.meshgrid(*steps, indexing="ij"), order=3, mode="nearest")


def test_values_and_crop_against_scipys_splines() -> None:
    """`map_coordinates` as the oracle, on a scan that is longer than 256 mm along one axis alone."""
    hu = np.random.default_rng(1).uniform(-1500, 900, (131, 11, 8))
    hu[40:60, 3:7, 2:6] = -1000
    cut = centred_on_mm(hu, (2.1, 1.3, 1.9))[9:265]
    assert cut.shape == (256, 14, 15)
    upper = np.quantile(cut, 0.999)
    expected = (np.clip(cut, -1000, upper) + 1000) / (upper + 1000)
    prepared = prepare("ct", hu.astype(np.float32), (2.1, 1.3, 1.9))
    found = prepared.volume
    np.testing.assert_allclose(found[:, 121:135, 120:135], expected, atol=1e-5)
    assert prepared.limits_hu == pytest.approx((-1000, upper))
    assert prepared.scanned == (256, 14, 15)
    outside = found.copy()
    outside[:, 121:135, 120:135] = 0
    assert not outside.any()


def test_what_lies_outside_the_crop_does_not_set_the_scale() -> None:
    """A table behind the patient, denser than the few bones, in a scan of 352 mm from front to back."""
    hu = np.full((88, 88, 16), -1000, np.float32)  # 4 mm voxels, stored LAS
    hu[24:64, 24:64] = 40  # soft tissue
    hu[42:46, 30:34] = 700  # the spine
    hu[20:68, :6] = 1500  # the table
    prepared = prepare("ct", hu, (4.0, 4.0, 4.0))
    assert prepared.volume.shape == (256, 256, 256)
    low, high = prepared.limits_hu
    assert low == -1000
    assert 650 < high < 800
    tissue = prepared.volume[128, 160, 128]
    assert tissue == pytest.approx(1040 / (high + 1000), abs=1e-3)
    whole = np.quantile(ndimage.zoom(hu, 4, order=1), 0.999)
    assert whole > 1400  # what the whole scan's quantile would be
    assert tissue > 1.4 * 1040 / (whole + 1000)


def test_air_in_no_voxel_scales_from_the_lowest() -> None:
    hu = np.random.default_rng(2).uniform(-800, 500, (12, 10, 9)).astype(np.float32)
    prepared = prepare("ct", hu, (1.0, 1.0, 1.0))
    assert prepared.limits_hu == pytest.approx((hu.min(), np.quantile(hu, 0.999)), abs=1e-2)


def test_training_reads_them_in_the_order_that_its_record_names(tmp_path: Path) -> None:
    volume = np.random.default_rng(3).random((9, 8, 7), np.float32)
    write_nifti(tmp_path / "a.nii.gz", volume, LAS)
    images = [{"file": "{case}.nii.gz", "intensity": [0.0, 1.0]}]
    data = DataSettings.model_validate({"path": ".", "layout": "files", "images": images, "window": [9, 8, 7]})
    (subject,) = find_subjects(tmp_path, data).subjects
    assert Record().orientation == "LPS"
    np.testing.assert_array_equal(decode(subject, data).unit()[0], volume[:, ::-1])


def test_bad_series_are_named_and_the_others_written(scan: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "dicom" / "good", scan, "good")
    write_series(tmp_path / "dicom" / "gap", scan, "../gap", skip=6)
    write_series(tmp_path / "dicom" / "few", scan[:, :, :3], "few")
    write_series(tmp_path / "dicom" / "side", scan, "side", orientation=(0, 1, 0, 0, 0, -1))
    outcomes = prepare_lidc(tmp_path / "dicom", tmp_path / "out")
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    assert (len(outcomes), len(failed)) == (4, 3)
    assert any("_gap" in one.name and "missing or doubled" in one.reason for one in failed)
    assert any("at least 8 slices" in one.reason for one in failed)
    assert [path.name[:5] for path in (tmp_path / "out").iterdir()] == ["good-"]


def test_a_file_that_is_no_prepared_scan_is_kept(scan: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "dicom", scan)
    (name,) = find_series(tmp_path / "dicom")
    foreign = tmp_path / "out" / f"{name}.nii.gz"
    foreign.parent.mkdir()
    foreign.write_bytes(b"bytes")
    (outcome,) = prepare_lidc(tmp_path / "dicom", tmp_path / "out")
    assert (outcome.status, outcome.name) == ("failed", name)
    assert f"{foreign} is there and was not made by cwdm" in outcome.reason
    assert foreign.read_bytes() == b"bytes"


def test_damaged_pixels_are_one_clear_message(scan: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "dicom", scan)
    path = sorted((tmp_path / "dicom").iterdir())[0]
    image = pydicom.dcmread(path)
    image.PixelData = image.PixelData[:100]
    image.save_as(path)
    (outcome,) = prepare_lidc(tmp_path / "dicom", tmp_path / "out")
    assert "cannot be read" in outcome.reason


def test_no_series_and_output_inside_the_input_are_refused(scan: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no CT images"):
        prepare_lidc(tmp_path / "empty", tmp_path / "out")
    write_series(tmp_path / "dicom", scan)
    with pytest.raises(InputError, match="choose another folder"):
        prepare_lidc(tmp_path / "dicom", tmp_path / "dicom" / "out")
