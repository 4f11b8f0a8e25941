import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from raw_scans import as_multi_frame, program, small, told_by_validator, write_dicom, write_head, write_study

from cwdm.arrays import Volume
from cwdm.errors import CaseError, NameInUseError
from cwdm.scans import Patient, Provenance, find_patients, read_patient, write_derivative, write_derived_series
from cwdm.scans.convert import convert_series
from cwdm.scans.series import find_series


def read_one(scans: Path, work: Path) -> Patient:
    (found,) = find_patients(scans)
    work.mkdir(exist_ok=True)
    return read_patient(found, work)


def provenance(patient: Patient) -> Provenance:
    return Provenance("t1c.safetensors (sha256 12ab)", patient.scans, "review", ("thick slices",), {"seed": 7})


def synthetic(patient: Patient, like: str) -> Volume:
    """A volume of whole numbers that depend on where in the head they are."""
    scan = patient.scans[like]
    x, y, z = np.indices(scan.shape)
    return (300 + 7 * x + 3 * y + 11 * z).astype(np.float32)


@pytest.fixture(scope="module")
def from_dicom(tmp_path_factory: pytest.TempPathFactory) -> Patient:
    folder = tmp_path_factory.mktemp("dicom")
    return read_one(write_study(folder / "A", ("t1n", "t2w", "t2f")), folder / "work")


@pytest.fixture(scope="module")
def from_bids(tmp_path_factory: pytest.TempPathFactory) -> Patient:
    root = tmp_path_factory.mktemp("bids") / "raw"
    anat = root / "sub-07" / "ses-2" / "anat"
    for number, (modality, suffix) in enumerate({"t1n": "T1w", "t2w": "T2w", "t2f": "FLAIR"}.items()):
        write_head(anat / f"sub-07_ses-2_{suffix}.nii.gz", modality, number)
    description = {"Name": "raw", "BIDSVersion": "1.10.1", "License": "CC0", "Authors": ["A", "B"]}
    (root / "dataset_description.json").write_text(json.dumps(description))
    (root / "README").write_text("Heads of phantoms, to see what becomes of them.\n" * 4)
    return read_one(root, root.parent / "work")


def test_derived_series_lies_where_its_source_lies(from_dicom: Patient, tmp_path: Path) -> None:
    like = from_dicom.scans["t2w"]
    volume = synthetic(from_dicom, "t2w")
    files = write_derived_series(tmp_path / "out" / "s", "A", "t1c", volume, like, provenance(from_dicom))
    assert like.series is not None
    sources = [pydicom.dcmread(path) for path in like.series.files]
    derived = [pydicom.dcmread(path) for path in files]
    assert len(derived) == len(sources)
    for made, source in zip(derived, sources, strict=True):
        for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "FrameOfReferenceUID"):
            assert made[name].value == source[name].value
        for name in ("PatientID", "PatientName", "PatientBirthDate", "StudyInstanceUID", "StudyDate"):
            assert made[name].value == source[name].value
        assert made.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert made.ImageType == ["DERIVED", "SECONDARY", "OTHER", "SYNTHETIC"]
        assert made.SeriesDescription == "SYNTHETIC T1C (cwdm)"
        assert "from t1n, t2w, t2f, weights t1c.safetensors" in made.DerivationDescription
        assert made.SeriesNumber == 9004
        assert not made.get("EchoTime")
        assert made.ScanningSequence == "RM"
    (series,) = {made.SeriesInstanceUID for made in derived}
    assert series != like.series.uid
    new = {made.SOPInstanceUID for made in derived}
    assert len(new) == len(derived)
    assert not new & {source.SOPInstanceUID for source in sources}


def test_derived_series_reads_back_as_the_volume(from_dicom: Patient, tmp_path: Path) -> None:
    like = from_dicom.scans["t2f"]
    volume = synthetic(from_dicom, "t2f")
    files = write_derived_series(tmp_path / "s", "A", "t1c", volume, like, provenance(from_dicom))
    (series,) = find_series(files).series
    image = nib.load(convert_series("A", series, tmp_path))
    np.testing.assert_array_equal(image.get_fdata(), volume)
    np.testing.assert_allclose(image.affine, like.affine, atol=1e-5)


def test_derived_series_of_a_multi_frame_file(tmp_path: Path) -> None:
    slices = write_dicom(tmp_path / "slices", *small("t2f"), "t2f")
    as_multi_frame(slices, tmp_path / "in" / "A" / "x.dcm")
    patient = read_one(tmp_path / "in", tmp_path / "work")
    like, volume = patient.scans["t2f"], synthetic(patient, "t2f")
    files = write_derived_series(tmp_path / "s", "A", "t1c", volume, like, provenance(patient))
    (series,) = find_series(files).series
    image = nib.load(convert_series("A", series, tmp_path))
    np.testing.assert_array_equal(image.get_fdata(), volume)
    np.testing.assert_allclose(image.affine, like.affine, atol=1e-5)
    frames = [pydicom.dcmread(path).SourceImageSequence[0].ReferencedFrameNumber for path in files]
    assert frames == list(range(1, 39))


def test_small_values_get_a_slope(from_dicom: Patient, tmp_path: Path) -> None:
    like = from_dicom.scans["t1n"]
    volume = synthetic(from_dicom, "t1n") / np.float32(900)
    files = write_derived_series(tmp_path / "s", "A", "t1c", volume, like, provenance(from_dicom))
    image = pydicom.dcmread(files[3])
    values = image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept)
    assert values.max() == pytest.approx(volume[:, :, 3].max(), abs=1e-4)


def test_same_voxels_give_the_same_files_and_others_other_numbers(from_dicom: Patient, tmp_path: Path) -> None:
    like = from_dicom.scans["t1n"]
    volume = synthetic(from_dicom, "t1n")
    bytes_of = [
        [path.read_bytes() for path in write_derived_series(tmp_path / name, "A", "t1c", values, like, how)]
        for name, values, how in (
            ("a", volume, provenance(from_dicom)),
            ("b", volume, provenance(from_dicom)),
            ("c", volume + 1, provenance(from_dicom)),
        )
    ]
    assert bytes_of[0] == bytes_of[1]
    uids = [pydicom.dcmread(tmp_path / name / "0001.dcm").SOPInstanceUID for name in "ac"]
    assert uids[0] != uids[1]


def test_a_derived_series_is_no_scan_when_found_again(from_dicom: Patient, tmp_path: Path) -> None:
    like = from_dicom.scans["t2w"]
    assert like.series is not None
    shutil.copytree(like.series.files[0].parents[1], tmp_path / "A")
    write_derived_series(tmp_path / "A" / "s", "A", "t1c", synthetic(from_dicom, "t2w"), like, provenance(from_dicom))
    again = read_one(tmp_path / "A", tmp_path / "work")
    assert set(again.scans) == {"t1n", "t2w", "t2f"}
    assert [one.reason for one in again.passed_over] == ["synthesised, not scanned"]


def test_what_cannot_be_written_as_a_series(from_dicom: Patient, from_bids: Patient, tmp_path: Path) -> None:
    like, how = from_dicom.scans["t2w"], provenance(from_dicom)
    volume = synthetic(from_dicom, "t2w")
    (tmp_path / "there").mkdir()
    with pytest.raises(NameInUseError, match="is there already"):
        write_derived_series(tmp_path / "there", "A", "t1c", volume, like, how)
    with pytest.raises(CaseError, match="A: the volume has 44×53×38 voxels, expected 45×53×38"):
        write_derived_series(tmp_path / "s", "A", "t1c", volume[1:], like, how)
    bids, on_its_grid = from_bids.scans["t2w"], synthetic(from_bids, "t2w")
    with pytest.raises(CaseError, match="did not come from DICOM"):
        write_derived_series(tmp_path / "s", "A", "t1c", on_its_grid, bids, how)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_derivative_of_a_bids_session(from_bids: Patient, tmp_path: Path) -> None:
    out, like = tmp_path / "out", from_bids.scans["t2w"]
    path = write_derivative(out, from_bids, "t1c", synthetic(from_bids, "t2w"), like, provenance(from_bids))
    name = "sub-07_ses-2_ce-gadolinium_space-T2w_desc-synthetic_T1w"
    assert path == out / "sub-07" / "ses-2" / "anat" / f"{name}.nii.gz"
    image = nib.load(path)
    np.testing.assert_array_equal(image.get_fdata(), synthetic(from_bids, "t2w"))
    np.testing.assert_allclose(image.affine, like.affine, atol=1e-4)
    assert image.get_data_dtype() == np.int16
    sidecar = json.loads((path.parent / f"{name}.json").read_text())
    assert sidecar["Synthesised"] is True
    assert sidecar["Sources"] == [
        f"bids:raw:sub-07/ses-2/anat/sub-07_ses-2_{suffix}.nii.gz" for suffix in ("T1w", "T2w", "FLAIR")
    ]
    assert sidecar["SpatialReference"] == "bids:raw:sub-07/ses-2/anat/sub-07_ses-2_T2w.nii.gz"
    assert sidecar["Settings"] == {"seed": 7}
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "cwdm"
    assert from_bids.dataset is not None
    assert (out / description["DatasetLinks"]["raw"]).resolve() == from_bids.dataset.resolve()
    # What was synthesised is no scan, if someone gives the derivatives back.
    with pytest.raises(CaseError, match="synthesised, not scanned"):
        read_one(out, tmp_path / "work")


def test_derivative_of_other_scans_has_a_label_of_its_own(from_dicom: Patient, tmp_path: Path) -> None:
    like = from_dicom.scans["t1n"]
    volume = synthetic(from_dicom, "t1n") / np.float32(5000)
    path = write_derivative(tmp_path, from_dicom, "t2f", volume, like, provenance(from_dicom))
    assert path.name == "sub-A_space-T1w_desc-synthetic_FLAIR.nii.gz"
    np.testing.assert_array_equal(nib.load(path).get_fdata(dtype=np.float32), volume)
    assert json.loads(path.with_name("sub-A_space-T1w_desc-synthetic_FLAIR.json").read_text())["Inputs"] == {
        "t1n": "series 3 'AX T1 SE'",
        "t2w": "series 4 'AX T2 TSE'",
        "t2f": "series 5 'AX FLAIR'",
    }


# Validators of others


def test_dciodvfy_finds_no_error(from_dicom: Patient, tmp_path: Path) -> None:
    checker = program("dciodvfy", "dicom3tools")
    like = from_dicom.scans["t2w"]
    files = write_derived_series(tmp_path / "s", "A", "t1c", synthetic(from_dicom, "t2w"), like, provenance(from_dicom))
    for path in (files[0], files[-1]):
        told = subprocess.run([checker, path], capture_output=True, text=True, check=False).stderr
        assert "MRImage" in told
        assert "Error" not in told


@pytest.fixture
def derivatives(from_bids: Patient, from_dicom: Patient, tmp_path: Path) -> Callable[[], Path]:
    def write() -> Path:
        for patient, like in ((from_bids, "t2w"), (from_dicom, "t1n")):
            for modality in ("t1c", "t2f"):
                volume = synthetic(patient, like)
                write_derivative(tmp_path / "out", patient, modality, volume, patient.scans[like], provenance(patient))
        return tmp_path / "out"

    return write


def test_validator_of_bids_finds_no_error(derivatives: Callable[[], Path]) -> None:
    assert told_by_validator(derivatives()) == {"warning": {"TOO_FEW_AUTHORS"}}


def test_validator_from_npm_takes_the_dataset_with_them(
    from_bids: Patient, derivatives: Callable[[], Path], tmp_path: Path
) -> None:
    """It knows no names of derivatives, but checks what is in their folder of a dataset as far as that goes."""
    checker = program("bids-validator", "npm install -g bids-validator")
    assert from_bids.dataset is not None
    shutil.copytree(from_bids.dataset, tmp_path / "raw")
    shutil.copytree(derivatives(), tmp_path / "raw" / "derivatives" / "cwdm")
    done = subprocess.run([checker, "--json", tmp_path / "raw"], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["issues"]["errors"] == []
