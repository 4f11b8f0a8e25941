"""Raw scans to what is missing, and back: heads of phantoms with skulls, on tilted grids of thick slices."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from raw_scans import head, scanned, small, tilt, told_by_validator, write_dicom, write_head, write_study
from scipy import ndimage
from typer.testing import CliRunner, Result

from cwdm.cli.app import app
from cwdm.errors import CaseError
from cwdm.files import hidden_path
from cwdm.images import read_grid, write_nifti
from cwdm.inference import Synthesizer
from cwdm.phantoms import make_phantom
from cwdm.report.scan_records import read_scan_records
from cwdm.scans import (
    Head,
    InSpace,
    Judgement,
    ScanOptions,
    bring_into,
    check_places,
    find_patients,
    find_space,
    read_patient,
    synthesise_missing,
)
from cwdm.scans.align import compose
from cwdm.scans.itk import read_transform
from cwdm.scans.run import _check_accepted
from cwdm.scans.written import check_possible, write_dataset, write_synthetic
from cwdm.settings import Settings

GIVEN = ("t1n", "t2w", "t2f")


def brain(number: int) -> tuple[np.ndarray, np.ndarray]:
    """The brain on the grid of `small`."""
    phantom = head()
    whole = make_phantom(0, phantom.volumes["t1n"].shape, 4.0).volumes["t1n"] > 0
    voxel_mm = (4.0 + 0.2 * number, 4.0 + 0.2 * number, 5.0)
    movement = tilt((4.0 + number, -3.0, 6.0), (2.0, -3.0 + number, 1.0))
    share, affine = scanned(1000.0 * whole, phantom.affine, voxel_mm, movement)
    return share > 500, affine


def command(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words)])


def options(root: Path) -> list[object]:
    masks = root / "masks" / "{modality}.nii.gz"
    return ["--weights", "bundled", "--device", "cpu", "--space", "native", "--brain-mask", masks]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound patient among others that are not, a BIDS dataset, and masks."""
    folder = tmp_path_factory.mktemp("raw")
    anat = folder / "bids" / "sub-07" / "ses-2" / "anat"
    for number, (modality, suffix) in enumerate(zip(GIVEN, ("T1w", "T2w", "FLAIR"), strict=True)):
        mask, affine = brain(number)
        (folder / "masks").mkdir(exist_ok=True)
        write_nifti(folder / "masks" / f"{modality}.nii.gz", mask.astype(np.uint8), affine)
        write_head(anat / f"sub-07_ses-2_{suffix}.nii.gz", modality, number)
        write_dicom(folder / "in" / "E-elsewhere" / modality, *small(modality, number + 1), modality, study="1.2.3.4")
    (folder / "bids" / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.10.1"}')
    write_study(folder / "in" / "B-dicom", GIVEN)
    write_head(folder / "alone" / "A-alone" / "A_t1w_pre.nii.gz")
    for number, name in enumerate(("first", "second")):
        write_head(folder / "in" / "D-ambiguous" / f"t1_{name}.nii.gz", number=number)
    return folder


def scan(root: Path, *more: object) -> Result:
    where = ["--output_path", root / "out", "--report_path", root / "report"]
    return command("scan", root / "in", *where, *options(root), "--dicom", "--keep-atlas", *more)


@pytest.fixture(scope="module")
def done(root: Path) -> Result:
    return scan(root)


def canonical(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return nib.as_closest_canonical(nib.Nifti1Image(volume, affine)).get_fdata()


def test_bad_patients_are_named_and_the_others_are_done(root: Path, done: Result) -> None:
    assert done.exit_code == 1, done.output
    assert "1 of 3 patients" in done.output
    assert "D-ambiguous: 2 T1 of which none says" in done.output
    assert "E-elsewhere: t1n: " in done.output
    assert [path.name for path in (root / "out").iterdir()] == ["B-dicom"]


def test_too_few_modalities_for_the_weights_are_said(weights_folder: Path, root: Path, tmp_path: Path) -> None:
    where = ["--output_path", tmp_path / "out", *options(root), "--weights", weights_folder]
    result = command("scan", root / "alone", *where)
    assert result.exit_code == 1
    assert "A-alone: only t1n there, and the weights for t1c need 3 modalities" in result.output


def test_result_is_like_the_truth_in_native_space(root: Path, done: Result) -> None:
    image = nib.load(root / "out" / "B-dicom" / "B-dicom-t1c.nii.gz")
    made = canonical(image.get_fdata(), image.affine)
    (truth, affine), (mask, _), (given, _) = small("t1c", 0), brain(0), small("t1n", 0)
    true, copied, inside = (canonical(volume.astype(np.float32), affine) for volume in (truth, given, mask))
    grid = nib.as_closest_canonical(nib.Nifti1Image(truth, affine)).affine
    np.testing.assert_allclose(nib.as_closest_canonical(image).affine, grid, atol=1e-3)
    assert 2 * ((inside > 0) & (made > 0)).sum() / ((inside > 0).sum() + (made > 0).sum()) > 0.97
    deep = ndimage.binary_erosion(inside > 0, iterations=2)
    likeness, of_a_copy = (np.corrcoef(volume[deep], true[deep])[0, 1] for volume in (made, copied))
    assert likeness > 0.25 > of_a_copy + 0.1
    assert made[deep].mean() == pytest.approx(true[deep].mean(), rel=0.15)


def test_series_sidecar_and_case_stand_beside_the_result(root: Path, done: Result) -> None:
    folder = root / "out" / "B-dicom"
    slices = [pydicom.dcmread(path) for path in (folder / "B-dicom-t1c-dicom").iterdir()]
    assert {one.SeriesDescription for one in slices} == {"SYNTHETIC T1C (cwdm)"}
    assert len(slices) == small("t1n", 0)[0].shape[2]
    sidecar = json.loads((folder / "B-dicom-t1c.json").read_text())
    assert sidecar["Settings"]["masks"] == dict.fromkeys(GIVEN, "given")
    assert sidecar["Weights"].startswith("any.safetensors (sha256 ")
    case = folder / "atlas"
    assert sorted(path.name for path in case.glob("*.nii.gz")) == [
        f"B-dicom-{m}.nii.gz" for m in ("t1c", *GIVEN[:1], "t2f", "t2w")
    ]
    there, back = (
        read_transform(case / "transforms" / f"B-dicom_{way}.txt")
        for way in ("from-native_to-t2w", "from-t2w_to-native")
    )
    np.testing.assert_allclose(there @ back, np.eye(4), atol=1e-9)


def test_report_shows_each_patient(root: Path, done: Result) -> None:
    records, faults = read_scan_records(root / "report")
    assert not faults
    assert [record.patient for record in records if record.verdict == "failed"] == [
        "D-ambiguous",
        "E-elsewhere",
    ]
    (sound,) = (record for record in records if record.patient == "B-dicom")
    registration, synthesis = sound.panels
    assert registration.rows == ("t2w and t1n", "t2f and t1n")
    assert [len(row) for row in registration.tiles] == [6, 6]
    assert synthesis.columns == ("t1n", "t1c, synthesised", "standard deviation")
    page = (root / "report" / "report.html").read_text()
    assert page.count("data:image/webp") == 2 * 6 + 3 * 3
    assert "2 T1 of which none says" in page
    assert str(root) not in page


def test_a_second_run_does_what_is_left(root: Path, done: Result) -> None:
    left = hidden_path(root / "out")  # by a run that was killed
    (left / "B-dicom").mkdir(parents=True)
    image = root / "out" / "B-dicom" / "B-dicom-t1c.nii.gz"
    before = image.stat().st_mtime_ns
    again = scan(root)
    assert "B-dicom is there already" in again.output
    assert image.stat().st_mtime_ns == before
    assert not left.exists()


def test_a_finished_patient_says_what_else_it_was_made_with(root: Path, done: Result) -> None:
    made = image_of(root).read_bytes()

    def again(*more: object) -> str:
        return command("scan", root / "in" / "B-dicom", "-o", root / "out", *options(root), *more).output

    assert "made with" not in again()
    for more in (["seed=2"], ["--grid", "t2w"], ["--space", "mni152"]):
        told = again(*more)
        assert "B-dicom is there already" in told
        assert "warning: t1c: made with other settings; --overwrite makes it again" in told
    (none := root / "none").mkdir()
    assert "warning: t1c: cannot tell whether it was made with these weights: " in again("--weights", none)
    assert image_of(root).read_bytes() == made


def image_of(root: Path) -> Path:
    return root / "out" / "B-dicom" / "B-dicom-t1c.nii.gz"


def test_other_folders_are_never_replaced(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "A").mkdir(parents=True)
    (tmp_path / "out" / "A" / "notes.txt").write_text("mine")
    write_head(tmp_path / "in" / "A" / "A_t1w_pre.nii.gz")
    result = command("prepare", "scans", tmp_path / "in", tmp_path / "out", "--overwrite")
    assert result.exit_code == 1
    assert "was not made by cwdm" in result.output
    assert (tmp_path / "out" / "A" / "notes.txt").read_text() == "mine"
    inside = command("prepare", "scans", tmp_path / "in", tmp_path / "in" / "A" / "out")
    assert "where nothing else may be written" in str(inside.exception)


def derive(root: Path, work: Path, out: Path, with_atlas: bool) -> None:
    """Derivatives of the BIDS dataset, with scans that lie where their headers say."""
    synthesizer = Synthesizer("bundled", Settings(), "cpu")
    (found,) = find_patients(root / "bids")
    check_places(root / "bids", [found], out, None)
    patient = read_patient(found, work)
    heads = {name: Head(read_grid(scan.path), brain(GIVEN.index(name))[0]) for name, scan in patient.scans.items()}
    space = find_space("native", heads["t1n"].image)
    still = compose(space, "t1n", heads, dict.fromkeys(heads, np.eye(4)), {}, {})
    scans = InSpace(patient, still, dict.fromkeys(heads, "given"), Judgement("review", ("thick slices",), {}))
    made = synthesise_missing(scans, synthesizer, "t2w")
    assert [one.provenance.verdict for one in made] == ["review"]
    write_dataset(out, [found], with_atlas)
    write_synthetic(out, scans, made, dicom=False, with_atlas=with_atlas)


def test_validator_of_bids_finds_no_error_in_all_that_a_run_leaves(root: Path, tmp_path: Path) -> None:
    derive(root, tmp_path, tmp_path / "out", with_atlas=True)
    assert (tmp_path / "out" / "sub-07" / "ses-2" / "atlas" / "transforms").is_dir()
    assert told_by_validator(tmp_path / "out") == {"warning": {"TOO_FEW_AUTHORS"}}


def test_bids_gives_derivatives_with_std_on_the_grid_that_is_asked_for(root: Path, tmp_path: Path) -> None:
    out = root / "bids" / "derivatives" / "cwdm"
    derive(root, tmp_path, out, with_atlas=False)
    anat = out / "sub-07" / "ses-2" / "anat"
    names = [f"sub-07_ses-2_ce-gadolinium_space-T2w_desc-{what}_T1w" for what in ("std", "synthetic")]
    assert sorted(path.name for path in anat.iterdir()) == [
        f"{name}{end}" for name in names for end in (".json", ".nii.gz")
    ]
    std, image = (nib.load(anat / f"{name}.nii.gz") for name in names)
    assert image.shape == std.shape == small("t2w", 1)[0].shape
    assert 0 < std.get_fdata().max() < image.get_fdata().max()
    described = json.loads((out / "dataset_description.json").read_text())
    assert described["DatasetLinks"] == {"raw": "../.."}


def test_prepared_scans_are_case_folders(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "alone" / "A-alone", tmp_path / "in" / "A-alone")
    masks = ["--space", "native", "--brain-mask", root / "masks" / "{modality}.nii.gz", "--device", "cpu"]
    result = command(
        "prepare", "scans", tmp_path / "in", "--output_path", tmp_path / "out", *masks, "--keep-transforms"
    )
    assert result.exit_code == 0, result.output
    image = nib.load(tmp_path / "out" / "A-alone" / "A-alone-t1n.nii.gz")
    volume, affine = small("t1n", 0)
    np.testing.assert_allclose(image.affine, affine, atol=1e-3)
    np.testing.assert_array_equal(image.get_fdata(), np.where(brain(0)[0], volume, 0))
    assert len(list((tmp_path / "out" / "A-alone" / "transforms").iterdir())) == 2
    again = command("prepare", "scans", tmp_path / "in", tmp_path / "out", *masks)
    assert "A-alone is there already" in again.output
    assert "warning" not in again.output
    other = command("prepare", "scans", tmp_path / "in", tmp_path / "out", "--space", "sri24")
    assert "warning: prepared in the space native, not sri24; --overwrite makes it again" in other.output


def test_a_rejected_registration_goes_on_only_if_a_person_says_so(root: Path, tmp_path: Path) -> None:
    (found,) = find_patients(root / "alone")
    scans = bring_into(read_patient(found, tmp_path), "native", "cpu", f"{root}/masks/{{modality}}.nii.gz")
    wrong = replace(scans, judgement=Judgement("reject", ("t2w and t1n fit as well when one is mirrored",), {}))
    with pytest.raises(CaseError, match="registration rejected: t2w and t1n fit"):
        _check_accepted(wrong, ScanOptions())
    _check_accepted(wrong, ScanOptions(keep_rejected=True))


def test_masks_that_are_nowhere_or_impossible_wishes_are_refused(root: Path, tmp_path: Path) -> None:
    (found,) = find_patients(root / "alone")
    patient = read_patient(found, tmp_path)
    with pytest.raises(CaseError, match=r"no brain mask found, looked for .*A-alone"):
        bring_into(patient, "native", "cpu", str(tmp_path / "{patient}-{modality}.nii.gz"))
    with pytest.raises(CaseError, match="--grid t2w: only t1n are there"):
        check_possible(patient, "t2w", dicom=False)
    with pytest.raises(CaseError, match="did not come from DICOM"):
        check_possible(patient, "", dicom=True)
