"""Case folders, what is read of them and written for them; nibabel is the oracle."""

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from small_case import AFFINE, NAME, SHAPE, brain, edited, fault, make_case, read, save

from cwdm import __version__
from cwdm.errors import CaseError, InputError
from cwdm.images import case_files, case_folder
from cwdm.images.cases import (
    MODALITIES,
    MOST_SIMILAR,
    Case,
    CaseFolder,
    find_cases,
    output_name,
    read_case,
    write_volume,
)

SHARED = Path(__file__).resolve().parents[4] / "shared"


# Folders


@pytest.mark.parametrize(
    ("file_name", "modality"),
    [
        (f"{NAME}-t1n.nii.gz", "t1n"),
        (f"{NAME}-t2f.nii", "t2f"),
        ("BraTS20_Training_001_t1.nii.gz", "t1n"),
        ("BraTS20_Training_001_t1ce.nii.gz", "t1c"),
        ("BraTS20_Training_001_t2.nii.gz", "t2w"),
        ("BraTS20_Training_001_flair.nii.gz", "t2f"),
        ("UPENN-GBM-00001_11_T1GD.nii.gz", "t1c"),
        ("x.T2W.NII.GZ", "t2w"),
        ("t1c.nii", "t1c"),
        ("FLAIR.nii.gz", "t2f"),
        (f"{NAME}-seg.nii.gz", None),
        (f"._{NAME}-t1n.nii.gz", None),
        (".t1n.nii.gz", None),
        ("mat1n.nii.gz", None),
        (f"{NAME}-t1n.nii.gz.tmp", None),
        (f"{NAME}-t1n.json", None),
        (f"{NAME}-t1n-mask.nii.gz", None),
    ],
)
def test_files_are_recognised_by_their_ending(tmp_path: Path, file_name: str, modality: str | None) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    other = "t2w" if modality == "t1n" else "t1n"
    (folder / f"{other}.nii").touch()
    (folder / file_name).touch()
    files = {name: path.name for name, path in case_folder(folder).files.items()}
    assert files.pop(other) == f"{other}.nii"
    assert files == ({modality: file_name} if modality else {})


def test_cases_are_sorted_folders_with_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b", "a 1", "é", "B", ".hidden", "empty", "notes"):
        (tmp_path / name).mkdir()
    for name in ("b", "a 1", "é", "B", ".hidden"):
        (tmp_path / name / "x-t1c.nii.gz").touch()
    (tmp_path / "notes" / "readme.txt").touch()
    (tmp_path / "loose-t1n.nii.gz").touch()
    cases = find_cases(tmp_path)
    assert [case.name for case in cases] == ["B", "a 1", "b", "é"]
    assert cases[0] == CaseFolder("B", tmp_path / "B", {"t1c": tmp_path / "B" / "x-t1c.nii.gz"})
    assert cases[0].missing == ("t1n", "t2w", "t2f")
    assert caplog.messages == [
        "passed over, no folders of a case: empty, notes",
        "passed over, not in the folder of a case: loose-t1n.nii.gz",
    ]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["x_t1w.nii.gz", "x_0000.nii.gz"], r"files like lost-t1n\.nii\.gz .*found x_0000\.nii\.gz, x_t1w\.nii\.gz"),
        ([f"{number}.nii" for number in range(9)], r"found 0\.nii, 1\.nii, 2\.nii and 6 more"),
        (["scan/x-t1n.nii.gz", "readme.txt"], r"expected its files in .*lost itself, found some in .*lost/scan"),
        (["a/b/c/x.nii"], r"found some in .*lost/a/b/c"),
    ],
)
def test_a_folder_whose_images_are_not_recognised_is_a_failed_case(tmp_path: Path, files: list[str], said: str) -> None:
    make_case(tmp_path, name="good")
    for name in files:
        path = tmp_path / "lost" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    good, lost = find_cases(tmp_path)
    assert read_case(good).target == "t1n"
    with pytest.raises(CaseError, match=said):
        read_case(lost)
    with pytest.raises(InputError, match=said):
        case_folder(tmp_path / "lost")


def test_what_has_nothing_to_do_with_cases_is_named_and_no_case(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_case(tmp_path, name="good")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "notes" / "old").mkdir(parents=True)
    (tmp_path / "notes" / ".snapshot").mkdir()
    for name in ("old/plan.txt", "._x-t1n.nii.gz", ".snapshot/x-t1n.nii.gz"):
        (tmp_path / "notes" / name).touch()
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "README").touch()
    assert [case.name for case in find_cases(tmp_path)] == ["good"]
    assert caplog.messages == ["passed over, no folders of a case: dangling, lost+found, notes, round"]


def test_a_flat_folder_of_many_cases(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b", "b-1", "a_2"):
        for path in make_case(tmp_path / "in", name=name).iterdir():
            path.rename(tmp_path / path.name)
    save(tmp_path / "a_2-seg.nii.gz")
    (tmp_path / "a_2-t1c.nii.gz").rename(tmp_path / "a_2_t1ce.nii.gz")
    save(tmp_path / "b_t1c.nii")
    cases = find_cases(tmp_path)
    assert [(case.name, case.missing) for case in cases] == [(name, ("t1n",)) for name in ("a_2", "b", "b-1")]
    assert sorted(case_files(cases[0])) == ["a_2-seg.nii.gz", "a_2-t2f.nii.gz", "a_2-t2w.nii.gz", "a_2_t1ce.nii.gz"]
    assert read_case(cases[2]).name == "b-1"
    with pytest.raises(CaseError, match=r"b: expected one file for t1c, found b-t1c\.nii\.gz and b_t1c\.nii"):
        read_case(cases[1])
    assert case_folder(tmp_path, "b-1") == cases[2]
    assert caplog.messages == ["passed over, no folders of a case: in"]
    with pytest.raises(InputError, match="give the folder above it"):
        find_cases(tmp_path, flat=False)


def test_files_of_two_patients_are_no_case(tmp_path: Path) -> None:
    folder = make_case(tmp_path)
    (folder / f"{NAME}-t2w.nii.gz").rename(folder / "BraTS-GLI-00002-000-t2w.nii.gz")
    reason = fault(folder)
    assert f"expected files of one patient, found {NAME}-t1c.nii.gz and BraTS-GLI-00002-000-t2w.nii.gz" in reason
    (folder / "BraTS-GLI-00002-000-t2w.nii.gz").rename(folder / f"{NAME.upper()}_t2.nii.gz")
    (folder / f"{NAME}-t1c.nii.gz").rename(folder / "t1c.nii.gz")
    assert read(folder).target == "t1n"


def test_a_name_must_leave_room_for_what_is_named_after_it(tmp_path: Path) -> None:
    make_case(tmp_path, name="é" + "n" * 235)
    (tmp_path / ("é" + "n" * 235)).rename(tmp_path / ("é" + "n" * 236))
    (long,) = find_cases(tmp_path)
    with pytest.raises(CaseError, match="name is too long"):
        read_case(long)
    (tmp_path / long.name).rename(tmp_path / long.name[:-1])
    assert find_cases(tmp_path)[0].problem is None


def test_folders_of_cases_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        find_cases(tmp_path / "none")
    with pytest.raises(InputError, match=r"no case found in .*t1n, t1c, t2w, t2f"):
        find_cases(tmp_path)
    (tmp_path / "x-t1n.nii.gz").touch()
    with pytest.raises(InputError, match="is not a folder"):
        find_cases(tmp_path / "x-t1n.nii.gz")
    with pytest.raises(InputError, match="give the folder above it") as caught:
        find_cases(tmp_path)
    assert str(tmp_path.parent) in str(caught.value)


def test_one_folder_as_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_case(tmp_path)
    monkeypatch.chdir(folder)
    assert case_folder(Path()) == case_folder(folder) == find_cases(tmp_path)[0]
    with pytest.raises(InputError, match="no case found"):
        case_folder(tmp_path)


def test_two_files_for_one_modality_are_that_case_s_problem(tmp_path: Path) -> None:
    make_case(tmp_path, name="good")
    folder = make_case(tmp_path, name="twice")
    save(folder / "old_t1ce.nii")
    good, twice = find_cases(tmp_path)
    assert read_case(good).target == "t1n"
    assert twice.problem is not None
    reason = fault(folder)
    assert "t1c" in reason
    assert "old_t1ce.nii" in reason
    assert "twice-t1c.nii.gz" in reason


def test_other_than_one_missing(tmp_path: Path) -> None:
    folder = make_case(tmp_path, "none")
    assert "found t1n, t1c, t2w, t2f with nothing missing" in fault(folder)
    (folder / f"{NAME}-t1c.nii.gz").unlink()
    (folder / f"{NAME}-t2f.nii.gz").unlink()
    assert "found t1n, t2w with t1c, t2f missing" in fault(folder)


UNREADABLE = textwrap.dedent("""
    import os, sys
    from pathlib import Path
    from cwdm.images.cases import find_cases, read_case
    if os.geteuid() == 0:
        os.setuid(65534)
    for case in find_cases(Path(sys.argv[1])):
        try:
            print(case.name, read_case(case).target)
        except Exception as error:
            print(type(error).__name__, error)
""")


def test_what_may_not_be_read(tmp_path: Path) -> None:
    # Not tmp_path: pytest keeps other users out of the folders above it.
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        top.chmod(0o755)
        make_case(top, name="a")
        make_case(top, name="b").chmod(0)
        (make_case(top, name="c") / "c-t2w.nii.gz").chmod(0)
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        command = [sys.executable, "-c", UNREADABLE, name]
        found = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.splitlines()
        (top / "b").chmod(0o755)
    assert found[0] == "a t1n"
    assert found[1].startswith("CaseError b: the folder")
    assert "Permission denied" in found[1]
    assert found[2].startswith("CaseError c: c-t2w.nii.gz: cannot be read: Permission denied")


# Reading


@pytest.mark.parametrize("missing", MODALITIES)
def test_a_sound_case(tmp_path: Path, missing: str) -> None:
    folder = make_case(tmp_path, missing)
    case = read(folder)
    assert (case.name, case.target) == (NAME, missing)
    assert list(case.volumes) == [modality for modality in MODALITIES if modality != missing]
    for modality, volume in case.volumes.items():
        assert volume.dtype == np.float32
        np.testing.assert_array_equal(volume, brain(MODALITIES.index(modality)))
    assert case.header.get_data_shape() == SHAPE
    np.testing.assert_allclose(case.affine, AFFINE)
    assert case.warnings == ("12×10×9 voxels instead of the 240×240×155 of BraTS",)


# Warnings


def test_warnings(tmp_path: Path) -> None:
    folder = make_case(tmp_path)
    for modality in ("t1c", "t2w", "t2f"):
        data = brain() + np.int16(modality == "t2w")
        save(folder / f"{NAME}-{modality}.nii.gz", data, np.diag([2.0, 2, 3, 1]), sform_code=0, qform_code=0)
    shape, spacing, codes, background = read(folder).warnings
    assert shape.startswith("12×10×9 voxels instead of")
    assert spacing.startswith("voxels of 2×2×3 mm instead of")
    assert "does not say how the head lies" in codes
    assert background.startswith("t2w: hardly any voxel is 0")


@pytest.mark.parametrize("qform_code", [-1, 0, 1])
def test_negative_codes_are_no_orientation(qform_code: int, tmp_path: Path) -> None:
    folder = make_case(tmp_path)
    oblique = AFFINE @ np.array([[0.6, 0.8, 0, 0], [-0.8, 0.6, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    for number, modality in enumerate(("t1c", "t2w", "t2f")):
        path = save(folder / f"{NAME}-{modality}.nii.gz", brain(number))
        image = nib.load(path)
        image.set_qform(oblique)
        changed = {name: image.header[name] for name in ("pixdim", *(f"quatern_{axis}" for axis in "bcd"))}
        codes = {"sform_code": -1, "qform_code": qform_code, "srow_x": 0}
        save(path, brain(number), **changed, **codes, **{f"qoffset_{axis}": 3 for axis in "xyz"})
    case = read(folder)
    assert case.has_orientation == (qform_code == 1)
    assert any("does not say how the head lies" in warning for warning in case.warnings) == (qform_code < 1)
    if qform_code == 1:
        np.testing.assert_allclose(case.affine[:3, :3], oblique[:3, :3], atol=1e-6)
        np.testing.assert_array_equal(case.affine[:3, 3], 3)
    write_volume(tmp_path / "out.nii.gz", brain(), case)
    header = nib.load(tmp_path / "out.nii.gz").header
    assert (header["sform_code"], header["qform_code"]) == (0, max(0, qform_code))


# Writing


def test_names_of_outputs() -> None:
    assert output_name(NAME, "t2f") == f"{NAME}-t2f.nii.gz"


@pytest.mark.parametrize("missing", MODALITIES)
def test_the_output_has_the_geometry_of_the_most_similar_modality(tmp_path: Path, missing: str) -> None:
    folder = make_case(tmp_path / "in", missing)
    for number, path in enumerate(sorted(folder.iterdir())):
        save(path, brain(number), qform_code=number, sform_code=4 - number, cal_max=9, aux_file=b"x")
    case = read(folder)
    path = tmp_path / output_name(NAME, missing)
    write_volume(path, case.volumes[MOST_SIMILAR[missing]], case)
    assert {entry.name for entry in tmp_path.iterdir()} == {"in", path.name}
    image = nib.load(path)
    model = nib.load(folder / f"{NAME}-{MOST_SIMILAR[missing]}.nii.gz")
    assert type(image) is nib.Nifti1Image
    assert image.header.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.asarray(image.dataobj), np.asarray(model.dataobj))
    np.testing.assert_array_equal(image.affine, model.affine)
    for field in ("dim", "pixdim", "xyzt_units", "qform_code", "sform_code", "qoffset_x", "quatern_d", "srow_x"):
        np.testing.assert_array_equal(image.header[field], model.header[field])
    assert image.header["descrip"].item().decode() == f"synthesised by cwdm {__version__} ({missing})"
    assert (image.header["cal_min"], image.header["cal_max"], image.header["aux_file"]) == (0, 0, b"")
    assert (image.dataobj.slope, image.dataobj.inter) == (1, 0)


def case_stored_as(folder: Path, data: np.ndarray, scaled: bool = False) -> Case:
    """A case whose t1c, the nearest to the missing t1n, is stored in the type of `data`."""
    case = make_case(folder)
    path = case / f"{NAME}-t1c.nii.gz"
    nib.save(nib.Nifti1Image(data, AFFINE, dtype=data.dtype), path)
    if scaled:
        edited(112, np.array([0.5, 1], "<f4").tobytes())(path)
    return read(case)


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">i2", "u2", "i4", "u4", "i8", "u8"])
def test_native_intensities_are_rounded_and_clipped_to_the_stored_integers(tmp_path: Path, dtype: str) -> None:
    case = case_stored_as(tmp_path, brain(1).astype(dtype))
    volume = np.zeros(SHAPE, np.float32)
    volume[0, 0, :7] = -1e30, -0.4, 0.6, 1.5, 99.4, 1e30, -3
    write_volume(tmp_path / "out.nii.gz", volume, case)
    image = nib.load(tmp_path / "out.nii.gz")
    limits = np.iinfo(dtype)
    written = np.asarray(image.dataobj)
    assert image.header.get_data_dtype() == np.dtype(dtype).newbyteorder("<")
    low, *middle, high, negative = (int(value) for value in written[0, 0, :7])
    assert low == limits.min
    assert middle == [0, 1, 2, 99]
    assert limits.max * (1 - 2**-24) <= high <= limits.max
    assert negative == max(-3, limits.min)


def test_other_volumes_are_written_as_float32(tmp_path: Path) -> None:
    unit = np.random.RandomState(0).random_sample(SHAPE).astype(np.float32)
    case = case_stored_as(tmp_path / "a", brain(1))
    write_volume(tmp_path / "unit.nii.gz", unit, case, native=False)
    write_volume(tmp_path / "scaled.nii.gz", unit, case_stored_as(tmp_path / "b", brain(1), scaled=True))
    write_volume(tmp_path / "float.nii.gz", unit, case_stored_as(tmp_path / "c", brain(1, np.float64)), native=True)
    write_volume(tmp_path / "integer.nii.gz", brain(3), case, native=False)
    for name in ("unit", "scaled", "float"):
        image = nib.load(tmp_path / f"{name}.nii.gz")
        assert image.header.get_data_dtype() == np.float32
        assert (image.dataobj.slope, image.dataobj.inter) == (1, 0)
        np.testing.assert_array_equal(np.asarray(image.dataobj), unit)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "integer.nii.gz").dataobj), brain(3))


def test_equal_volumes_make_equal_files_without_names_or_times(tmp_path: Path) -> None:
    case = read(make_case(tmp_path))
    for name in ("a.nii.gz", "b.nii.gz"):
        write_volume(tmp_path / name, np.asfortranarray(brain()), case)
    write_volume(tmp_path / "c.nii.gz", np.ascontiguousarray(brain()).astype(np.float32), case)
    first, second, third = ((tmp_path / name).read_bytes() for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz"))
    assert first == second == third
    assert first[3:8] == bytes(5)  # no name, comment or time


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("native", [True, False])
def test_a_result_that_is_not_finite_is_refused(tmp_path: Path, value: float, native: bool) -> None:
    case = read(make_case(tmp_path))
    volume = np.zeros(SHAPE, np.float32)
    volume[1, 2, 3] = value
    with pytest.raises(CaseError, match=f"{NAME}: the synthesised t1n has 1 voxels that are not finite"):
        write_volume(tmp_path / "out.nii.gz", volume, case, native)
    assert not (tmp_path / "out.nii.gz").exists()


# Real cases


@pytest.mark.skipif(not SHARED.is_dir(), reason="real cases stand beside the repository in development and CI only")
@pytest.mark.parametrize(("name", "missing"), [("BraTS-GLI-00001-000", "t1n"), ("BraTS-TCGA-07294-000", "t2f")])
def test_real_cases(tmp_path: Path, name: str, missing: str) -> None:
    (tmp_path / name).mkdir()
    for path in (SHARED / "cases" / name).iterdir():
        if missing not in path.name:
            (tmp_path / name / path.name).symlink_to(path)
    case = read(tmp_path / name)
    assert (case.name, case.target, case.warnings) == (name, missing, ())
    for modality, volume in case.volumes.items():
        image = nib.load(tmp_path / name / f"{name}-{modality}.nii.gz")
        assert np.array_equal(volume, np.asarray(image.dataobj))
        assert np.array_equal(case.affine, image.affine)
