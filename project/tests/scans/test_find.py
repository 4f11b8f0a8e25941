import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian
from raw_scans import LPS, as_multi_frame, small, write_dicom, write_head, write_study

from cwdm.errors import CaseError, CwdmError, InputError
from cwdm.scans import Patient, find_patients, read_patient, read_table

SOURCES = {"t1n": "t1.nii.gz", "t1c": "t1_gd.nii", "t2w": "T2W.nii.gz", "t2f": "p_flair.nii.gz"}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Patient]:
    """The one patient in a folder."""

    def read_one(scans: Path, table: str = "") -> Patient:
        (found,) = find_patients(scans)
        (work := tmp_path / "work").mkdir(exist_ok=True)
        (tmp_path / "table.csv").write_text(table or "scan,modality\n")
        return read_patient(found, work, read_table(tmp_path / "table.csv"))

    return read_one


@pytest.fixture
def nifti(tmp_path: Path) -> Path:
    """A patient of four NIfTI files."""
    for number, (modality, name) in enumerate(SOURCES.items()):
        write_head(tmp_path / "in" / "A" / name, modality, number)
    return tmp_path / "in" / "A"


@pytest.fixture
def dicom(tmp_path: Path) -> Path:
    """A patient of four DICOM series."""
    return write_study(tmp_path / "in" / "A")


def reason_of(read: Callable[..., Patient], scans: Path, table: str = "") -> str:
    with pytest.raises(CaseError) as error:
        read(scans, table)
    assert error.value.case == "A"
    return error.value.reason


# Good input


def test_nifti_files_by_their_names(nifti: Path, read: Callable[..., Patient]) -> None:
    for name in ("mask_t1.nii.gz", "adc.nii.gz", "notes.txt"):
        (nifti / name).write_text("not looked at")
    patient = read(nifti.parent)
    assert {modality: scan.source for modality, scan in patient.scans.items()} == SOURCES
    assert [one.line for one in patient.passed_over] == [
        "passed over adc.nii.gz: diffusion",
        "passed over mask_t1.nii.gz: a mask",
    ]
    volume, affine = small("t2w", 2)
    assert patient.scans["t2w"].shape == volume.shape
    np.testing.assert_allclose(patient.scans["t2w"].affine, affine, atol=1e-4)


def test_dicom_series_by_their_headers_where_they_were_scanned(dicom: Path, read: Callable[..., Patient]) -> None:
    patient = read(dicom.parent)
    assert list(patient.scans) == ["t1n", "t1c", "t2w", "t2f"]
    for number, (modality, scan) in enumerate(patient.scans.items()):
        volume, affine = small(modality, number)
        image = nib.load(scan.path)
        # The converter may turn axes round; what lies at a place in the head may not change.
        to_written = np.linalg.inv(affine) @ image.affine
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in image.shape])).reshape(3, -1)
        indices = np.rint(to_written[:3, :3] @ corners + to_written[:3, 3:]).astype(int)
        np.testing.assert_allclose(to_written[:3, :3] @ corners + to_written[:3, 3:], indices, atol=1e-3)
        voxels = np.argwhere(np.ones(image.shape, bool)).T
        there = np.rint(to_written[:3, :3] @ voxels + to_written[:3, 3:]).astype(int)
        np.testing.assert_array_equal(np.asarray(image.dataobj).reshape(-1), volume[tuple(there)])
    assert patient.scans["t2f"].metadata["InversionTime"] == 2.5
    assert patient.scans["t1c"].source == "series 8 'AX T1 SE'"


def test_bids_sessions_with_inherited_metadata(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for number, name in enumerate(("T1w", "ce-gadolinium_T1w", "T2w", "FLAIR", "T2starw")):
        write_head(root / "sub-01" / "ses-pre" / "anat" / f"sub-01_ses-pre_{name}.nii.gz", number=number)
    write_head(root / "sub-02" / "anat" / "sub-02_T2w.nii.gz")
    write_head(root / "derivatives" / "x" / "sub-02" / "anat" / "sub-02_T1w.nii.gz")
    (root / "T2w.json").write_text(json.dumps({"EchoTime": 0.1, "RepetitionTime": 4}))
    (root / "sub-01" / "sub-01_T2w.json").write_text(json.dumps({"RepetitionTime": 5}))
    (root / "sub-01" / "sub-01_acq-x_T2w.json").write_text(json.dumps({"RepetitionTime": 6}))
    first, second = find_patients(root)
    assert (first.name, first.subject, first.session) == ("sub-01_ses-pre", "01", "pre")
    assert (second.name, second.subject, second.session) == ("sub-02", "02", "")
    patient = read_patient(first, tmp_path)
    assert patient.scans["t1c"].source == "sub-01/ses-pre/anat/sub-01_ses-pre_ce-gadolinium_T1w.nii.gz"
    assert list(patient.scans) == ["t1n", "t1c", "t2w", "t2f"]
    assert patient.scans["t2w"].metadata == {"EchoTime": 0.1, "RepetitionTime": 5}
    assert [one.reason for one in patient.passed_over] == ["its suffix is T2starw, none of FLAIR, T1w, T2w"]
    assert list(read_patient(second, tmp_path).scans) == ["t2w"]


def test_patients_are_folders_or_the_folder_itself(
    nifti: Path, dicom: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(dicom / "3")
    (nifti.parent / "empty").mkdir()
    write_dicom(nifti.parent / "B" / "x" / "y", *small("t2w"), "t2w", study="1.2.3")
    with caplog.at_level(logging.WARNING):
        assert [one.name for one in find_patients(nifti.parent)] == ["A", "B"]
    assert "empty" in caplog.text
    assert [one.name for one in find_patients(nifti)] == ["A"]
    study = write_study(tmp_path / "S", ("t1n", "t2w"))
    assert [one.name for one in find_patients(study)] == ["S"]
    assert [one.name for one in find_patients(study / "0")] == ["0"]


def test_what_is_no_folder_of_scans_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        find_patients(tmp_path / "none")
    with pytest.raises(InputError, match="no images found"):
        find_patients(tmp_path)
    (tmp_path / "dataset_description.json").write_text("{}")
    with pytest.raises(InputError, match="no subject with anatomical images"):
        find_patients(tmp_path)


def test_table_has_the_last_word(nifti: Path, dicom: Path, read: Callable[..., Patient]) -> None:
    for folder in dicom.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    (nifti / "t1.nii.gz").rename(nifti / "first.nii.gz")
    (nifti / "t1_gd.nii").rename(nifti / "T2_second.nii")
    table = "patient;scan;modality\nA;first*;t1n\n;t2_SECOND.nii;T1C\nB;t2w*;skip\n"
    assert read(nifti.parent, table).scans["t1c"].source == "T2_second.nii"
    assert read(nifti.parent, table).scans["t1n"].source == "first.nii.gz"
    assert "line 2 of the table names 'gone.nii'" in reason_of(
        read, nifti.parent, "patient,scan,modality\nA,gone.nii,t1n"
    )


def test_table_names_series_by_number_or_description(dicom: Path, read: Callable[..., Patient]) -> None:
    patient = read(dicom.parent, "scan,modality\n8,skip\nax t2*,t1c\n")
    assert patient.scans["t1c"].source == "series 4 'AX T2 TSE'"
    assert [one.line for one in patient.passed_over] == ["passed over series 8 'AX T1 SE': the table says so"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "expected the columns patient, scan, modality"),
        ("scan,modality\nx,t3\n", "line 2: unknown modality 't3'; one of t1n"),
        ("scan,modality\nx\n", "line 2: expected 2 columns, found 1"),
        ("scan,modality\n,t1n\n", "line 2: the scan is empty"),
        ("", "found nothing"),
    ],
)
def test_table_that_says_something_else(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / "t.csv")


def test_derived_series_and_copies_are_passed_over_by_name(dicom: Path, read: Callable[..., Patient]) -> None:
    volume, affine = small("t2w")
    write_dicom(dicom / "4", volume[:, :, :3], affine, "t2w", SeriesDescription="3-plane loc", SeriesNumber=1)
    write_dicom(dicom / "5", volume, affine, "t1n", ImageType=["ORIGINAL", "PRIMARY", "P"], SeriesNumber=9)
    write_dicom(dicom / "6", volume, affine, "t2w", ImageType=["DERIVED", "PRIMARY", "MPR"], SeriesNumber=10)
    write_dicom(dicom / "7", volume, affine, "t2w", Modality="CT", PatientID="other", SeriesNumber=11)
    shutil.copytree(dicom / "2", dicom / "again")
    (dicom / "2" / "broken.dcm").write_bytes(sorted((dicom / "2").iterdir())[0].read_bytes()[:600])
    patient = read(dicom.parent)
    assert [one.reason for one in patient.passed_over] == [
        "copies of images that are there already",
        "no image can be read from their headers",
        "a localiser",
        "a phase image",
        "a reformatted image",
        "CT, not MR",
    ]
    assert patient.scans["t2w"].source == "series 4 'AX T2 TSE'"


def test_a_lone_t1_that_says_nothing_of_contrast_agent_is_remarked(nifti: Path, read: Callable[..., Patient]) -> None:
    assert read(nifti.parent).remarks == ()
    (nifti / "t1_gd.nii").unlink()
    (remark,) = read(nifti.parent).remarks
    assert remark.startswith("t1.nii.gz is taken for t1n: nothing says that contrast agent was given")
    (nifti / "t1.nii.gz").rename(nifti / "t1n.nii.gz")
    assert read(nifti.parent).remarks == ()


def test_two_echoes_of_one_series_are_two_images(tmp_path: Path, read: Callable[..., Patient]) -> None:
    volume, affine = small("t2w")
    both = {"SeriesInstanceUID": "1.2.3", "SeriesDescription": "AX DE", "SeriesNumber": 2, "RepetitionTime": 3000.0}
    write_dicom(tmp_path / "in" / "A" / "0", volume // 2, affine, "t2w", EchoTime=20.0, **both)
    write_dicom(tmp_path / "in" / "A" / "1", volume, affine, "t2w", EchoTime=95.0, **both)
    patient = read(tmp_path / "in")
    assert patient.scans["t2w"].source == "series 2 'AX DE' (echo 95 ms)"
    assert np.asarray(nib.load(patient.scans["t2w"].path).dataobj).max() == volume.max()
    assert patient.passed_over[0].line == "passed over series 2 'AX DE' (echo 20 ms): nothing tells its modality"


def test_multi_frame_file(tmp_path: Path, read: Callable[..., Patient]) -> None:
    slices = write_dicom(tmp_path / "slices", *small("t2f"), "t2f", SeriesDescription="AX 4")
    as_multi_frame(slices, tmp_path / "in" / "A" / "x.dcm")
    scan = read(tmp_path / "in").scans["t2f"]
    assert scan.metadata["InversionTime"] == 2.5
    assert np.asarray(nib.load(scan.path).dataobj).sum() == small("t2f")[0].sum()
    (slices / "0333.dcm").unlink()  # the tenth
    as_multi_frame(slices, tmp_path / "in" / "A" / "x.dcm")
    assert "slices are missing: they lie 5.00 to 10.00 mm apart" in reason_of(read, tmp_path / "in" / "A")


def test_a_bad_patient_leaves_the_others(nifti: Path, tmp_path: Path) -> None:
    shutil.copytree(nifti, nifti.parent / "B")
    (nifti / "t1.nii.gz").write_bytes(b"no gzip")
    first, second = find_patients(nifti.parent)
    with pytest.raises(CaseError, match=r"A: t1.nii.gz: is not a sound gzip file"):
        read_patient(first, tmp_path)
    assert len(read_patient(second, tmp_path).scans) == 4


# Bad input, one message each


def test_two_t1_of_which_none_says_contrast_agent(nifti: Path, dicom: Path, read: Callable[..., Patient]) -> None:
    assert reason_of(read, write_two_t1(dicom)).startswith(
        "2 T1 of which none says whether contrast agent was given (series 3 'AX T1 SE' and series 8 'AX T1 SE'); "
        "say it in a table: --modalities TABLE.csv"
    )


def write_two_t1(dicom: Path) -> Path:
    shutil.rmtree(dicom)
    for number in (3, 8):
        write_dicom(dicom / str(number), *small("t1n", number), "t1n", SeriesNumber=number)
    return dicom.parent


def test_two_images_of_one_modality(nifti: Path, read: Callable[..., Patient]) -> None:
    write_head(nifti / "t2_cor.nii.gz", "t2w", 5)
    assert "2 images are t2w (T2W.nii.gz and t2_cor.nii.gz)" in reason_of(read, nifti.parent)


def test_copy_under_a_name_of_the_same_modality_is_passed_over(nifti: Path, read: Callable[..., Patient]) -> None:
    write_head(nifti / "t2_again.nii", "t2w", 2)  # packed otherwise
    assert [one.line for one in read(nifti.parent).passed_over] == ["passed over t2_again.nii: a copy of T2W.nii.gz"]


def test_same_voxels_under_names_of_two_modalities(nifti: Path, read: Callable[..., Patient]) -> None:
    shutil.copy(nifti / "t1.nii.gz", nifti / "T2W.nii.gz")
    assert "t1.nii.gz (t1n) and T2W.nii.gz (t2w) hold the same voxels" in reason_of(read, nifti.parent)


def test_nifti_and_dicom_of_the_same_series(dicom: Path, read: Callable[..., Patient]) -> None:
    write_head(dicom / "t2.nii.gz", "t2w", 2)
    assert reason_of(read, dicom.parent).startswith(
        "t2w is there as NIfTI and as DICOM (such as t2.nii.gz and series 4 'AX T2 TSE'); take the NIfTI files or the "
        "DICOM series away, or say it in a table"
    )
    assert read(dicom.parent, "scan,modality\nt2.nii.gz,skip\n").scans["t2w"].series is not None


def test_whole_patient_as_nifti_and_as_dicom(nifti: Path, dicom: Path, read: Callable[..., Patient]) -> None:
    assert reason_of(read, nifti.parent).startswith(
        "t1n, t1c, t2w, t2f are there as NIfTI and as DICOM (such as t1.nii.gz and series 3 'AX T1 SE'); take the "
    )
    (nifti / "converted").mkdir()  # mixed in other folders: below the patient's, all counts
    for name in SOURCES.values():
        (nifti / name).rename(nifti / "converted" / name)
    assert [found.name for found in find_patients(nifti.parent)] == ["A"]
    assert reason_of(read, nifti.parent).startswith("t1n, t1c, t2w, t2f are there as NIfTI and as DICOM (such as con")


def test_modalities_of_one_patient_in_two_formats(nifti: Path, dicom: Path, read: Callable[..., Patient]) -> None:
    for name in ("t1.nii.gz", "t1_gd.nii"):
        (nifti / name).unlink()
    for number in (2, 3):
        shutil.rmtree(dicom / str(number))
    for scans in (nifti.parent, nifti):  # the folder of the patient, and the patient's folder
        patient = read(scans)
        assert patient.name == "A"
        assert {modality: scan.series is not None for modality, scan in patient.scans.items()} == {
            **{"t1n": True, "t1c": True},
            **{"t2w": False, "t2f": False},
        }


def test_ambiguous_name(nifti: Path, read: Callable[..., Patient]) -> None:
    write_head(nifti / "t2_in_t1.nii.gz")
    reason = reason_of(read, nifti.parent)
    assert reason.startswith("ambiguous: t2_in_t1.nii.gz (its name says T1 and T2); say it in a table")


def test_truncated_file(dicom: Path, read: Callable[..., Patient]) -> None:
    path = sorted((dicom / "2").iterdir())[7]
    path.write_bytes(path.read_bytes()[:-500])
    assert f"series 4 'AX T2 TSE': {path.name} is truncated" in reason_of(read, dicom.parent)


def test_nothing_but_unsuited_images(nifti: Path, read: Callable[..., Patient]) -> None:
    for name in SOURCES.values():
        (nifti / name).unlink()
    (nifti / "dwi.nii.gz").write_text("")
    assert reason_of(read, nifti.parent).startswith(
        "no image is one of t1n, t1c, t2w, t2f: passed over dwi.nii.gz: diffusion"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leave_out": (9,)}, "slices are missing: they lie 5.00 to 10.00 mm apart"),
        ({"ImagesInAcquisition": 50}, "slices are missing: 38 of 50"),
        ({"lean": 1.2}, "the gantry was tilted: the stack leans by 13.5 degrees"),
        ({"ImagePositionPatient": [0, 0, 0]}, "all slices lie at one place"),
        ({"ImagePositionPatient": None}, "the geometry in its headers cannot be read"),
        ({"leave_out": tuple(range(5, 38))}, "only 5 slices, expected at least 8"),
        ({"SamplesPerPixel": 3}, "is in colour"),
    ],
)
def test_series_that_is_no_whole_volume(
    changes: dict[str, Any], message: str, tmp_path: Path, read: Callable[..., Patient]
) -> None:
    write_dicom(tmp_path / "in" / "A", *small("t2w"), "t2w", **changes)
    if "SamplesPerPixel" in changes:
        for path in (tmp_path / "in" / "A").iterdir():
            image = pydicom.dcmread(path)
            image.SamplesPerPixel = 3
            image.save_as(path)
    assert message in reason_of(read, tmp_path / "in" / "A")


def test_time_series(tmp_path: Path, read: Callable[..., Patient]) -> None:
    for _ in range(2):
        write_dicom(tmp_path / "in" / "A" / str(_), *small("t2w"), "t2w", SeriesInstanceUID="1.2.3")
    assert "4D: 76 slices at 38 places" in reason_of(read, tmp_path / "in")


def test_slices_of_two_sizes_or_orientations(tmp_path: Path, read: Callable[..., Patient]) -> None:
    volume, affine = small("t2w")
    folder = tmp_path / "in" / "A"
    write_dicom(folder / "0", volume, affine, "t2w", SeriesInstanceUID="1.2.3")
    write_dicom(folder / "1", volume[1:], affine, "t2w", SeriesInstanceUID="1.2.3")
    assert "slices of different sizes" in reason_of(read, folder.parent)
    shutil.rmtree(folder / "1")
    turned = np.diag([1, -1, -1, 1]) @ affine
    write_dicom(folder / "1", volume, turned, "t2w", SeriesInstanceUID="1.2.3")
    assert "slices of several orientations" in reason_of(read, folder.parent)


def test_mixed_patients_and_studies(dicom: Path, read: Callable[..., Patient]) -> None:
    write_dicom(dicom / "9", *small("t2w"), "t2w", patient="Q-18", SeriesNumber=30)
    assert "mixed patients: its DICOM files are of 2 ('P-17' Doe^P-17; 'Q-18' Doe^Q-18)" in reason_of(
        read, dicom.parent
    )
    shutil.rmtree(dicom / "9")
    write_dicom(dicom / "9", *small("t2w"), "t2w", StudyDate="20250101", SeriesNumber=30)
    assert "its DICOM files are of 2 studies (20240131, 20250101)" in reason_of(read, dicom.parent)


def test_files_named_after_two_patients(nifti: Path, read: Callable[..., Patient]) -> None:
    (nifti / "T2W.nii.gz").rename(nifti / "smith_t2.nii.gz")
    (nifti / "p_flair.nii.gz").rename(nifti / "jones_3_flair.nii.gz")
    assert "mixed patients: jones_3_flair.nii.gz and smith_t2.nii.gz" in reason_of(read, nifti.parent)
    (nifti / "jones_3_flair.nii.gz").rename(nifti / "ax_flair.nii.gz")
    assert len(read(nifti.parent).scans) == 4


def damaged(image: nib.Nifti1Image, fault: str) -> nib.Nifti1Image:
    voxels, affine, header = np.asarray(image.dataobj), image.affine, image.header
    if fault == "no orientation":
        header.set_sform(None, 0)
        header.set_qform(None, 0)
        return nib.Nifti1Image(voxels, None, header)
    if fault == "4D":
        return nib.Nifti1Image(np.stack([voxels, voxels], -1), affine)
    if fault == "tilted":
        shear = np.eye(4)
        shear[1, 2] = 0.2
        return nib.Nifti1Image(voxels, affine @ shear)
    if fault == "phase":
        return nib.Nifti1Image((voxels % 8192 - 4096).astype(np.int16), affine)
    if fault == "mask":
        return nib.Nifti1Image((voxels > 50).astype(np.uint8), affine)
    if fault == "thin":
        return nib.Nifti1Image(voxels[:, :, :4], affine)
    return nib.Nifti1Image(voxels, LPS)  # voxels of 1 mm, of a head of 4


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no orientation", "its header does not say how the head lies"),
        ("4D", "expected one 3D volume, found 43×51×38×2 voxels"),
        ("tilted", "its axes lean by"),
        ("phase", "of its voxels are negative, so it holds no magnitudes (a phase image"),
        ("mask", "only 2 different values, as of a mask"),
        ("thin", "only 4 slices, expected at least 8"),
        ("small", "43×51×38 mm are no head"),
    ],
)
def test_nifti_that_is_no_scan(fault: str, message: str, nifti: Path, read: Callable[..., Patient]) -> None:
    path = nifti / "T2W.nii.gz"
    image = nib.load(path)
    nib.save(damaged(nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header), fault), path)
    reason = reason_of(read, nifti.parent)
    assert reason.startswith("T2W.nii.gz: ")
    assert message in reason


# Hostile input


@pytest.mark.filterwarnings("error")
def test_damaged_headers_damage_no_more_than_a_message(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    slices = write_dicom(tmp_path / "in" / "A", *small("t2f"), "t2f")
    whole = as_multi_frame(slices, tmp_path / "whole.dcm").read_bytes()
    for number in range(60):
        damaged = bytearray(whole)
        for at in rng.integers(0, 9000, rng.integers(1, 20)):
            damaged[at] = rng.integers(256)
        (slices / f"{number}.dcm").write_bytes(damaged[: rng.integers(200, 2 * len(damaged))])
    (found,) = find_patients(tmp_path / "in")
    with pytest.raises(CaseError):
        read_patient(found, tmp_path)


def test_deflated_headers_are_not_unfolded(tmp_path: Path) -> None:
    write_dicom(tmp_path / "A", *small("t2w"), "t2w")
    for path in (tmp_path / "A").iterdir():
        image = pydicom.dcmread(path)
        image.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        image.save_as(path)
    (found,) = find_patients(tmp_path)
    with pytest.raises(CaseError, match="no image can be read from their headers"):
        read_patient(found, tmp_path)


def test_links_to_folders_are_not_followed_and_names_stay_one_line(
    tmp_path: Path, read: Callable[..., Patient]
) -> None:
    folder = tmp_path / "in" / "A"
    write_dicom(folder / "0", *small("t2w"), "t2w", SeriesDescription="AX T2\x1b[2J")
    (folder / "loop").symlink_to(folder)
    assert read(tmp_path / "in").scans["t2w"].source == "series 4 'AX T2?[2J'"


def test_sidecar_of_any_content(nifti: Path, read: Callable[..., Patient]) -> None:
    (nifti / "t1.json").write_text(
        '{"EchoTime": {"a": []}, "ImageType": 7, "SeriesDescription": ["x"], "PatientID": null}'
    )
    (nifti / "T2W.json").write_text("[" * 100_000)
    (nifti / "p_flair.json").write_bytes(b"\xff\xfe{")
    assert len(read(nifti.parent).scans) == 4


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("cwdm.scans", "pydicom"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    import cwdm.scans

    with pytest.raises(CwdmError, match=r"pydicom is missing; pip install 'cwdm\[scans\]' brings DICOM"):
        _ = cwdm.scans.find_patients
