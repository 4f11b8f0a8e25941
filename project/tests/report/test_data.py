"""What a report is made from: records, and the volumes that they speak of."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from cwdm.errors import CaseError
from cwdm.images import output_name, read_grid, write_nifti
from cwdm.report import ReportPaths, write_report
from cwdm.report.data import CaseVolumes, read_records, read_volumes

from .report_cases import MODALITY, add_case, mirror

CASE = "BraTS-PHANTOM-00000-000"


@pytest.fixture
def paths(phantoms: Path, tmp_path: Path) -> ReportPaths:
    return add_case(tmp_path, phantoms / CASE, CASE)


def volumes(paths: ReportPaths) -> CaseVolumes:
    (entry,) = read_records(paths.report).entries
    return read_volumes(entry, paths)


def test_another_patient_in_the_folder_is_not_shown(paths: ReportPaths, phantoms: Path, tmp_path: Path) -> None:
    flat = replace(paths, data=tmp_path / "flat")
    (tmp_path / "flat").mkdir()
    for path in (phantoms / "BraTS-PHANTOM-00001-000").iterdir():
        (tmp_path / "flat" / path.name).symlink_to(path)
    with pytest.raises(CaseError, match=r"its input is not at .*flat; give --data_path"):
        volumes(flat)
    for path in (phantoms / CASE).iterdir():
        (tmp_path / "flat" / path.name).symlink_to(path)
    np.testing.assert_array_equal(volumes(flat).conditions["t2w"], volumes(paths).conditions["t2w"])


def test_the_same_grid_in_another_voxel_order_is_shown_alike(paths: ReportPaths, tmp_path: Path) -> None:
    straight = volumes(paths)
    mirror(tmp_path / "truth" / CASE / output_name(CASE, MODALITY), 0)
    mirror(tmp_path / "truth" / CASE / output_name(CASE, "seg"), 1)
    mirror(tmp_path / "output" / output_name(CASE, MODALITY), 2)
    turned = volumes(paths)
    np.testing.assert_allclose(turned.synthesis, straight.synthesis, atol=1e-6)
    assert straight.truth is not None
    np.testing.assert_allclose(turned.truth, straight.truth, atol=1e-6)
    np.testing.assert_array_equal(turned.tumour, straight.tumour)
    assert turned.centre == straight.centre


def test_slices_go_through_the_largest_lesion(paths: ReportPaths, tmp_path: Path) -> None:
    path = tmp_path / "truth" / CASE / output_name(CASE, "seg")
    segmentation = read_grid(path)
    labels = np.zeros_like(segmentation.volume)
    labels[8:9, 8:9, 4:12] = 1  # the longest along the third axis, and not the largest
    labels[18:22, 14:18, 16:19] = 3
    path.unlink()
    write_nifti(path, labels, segmentation.affine)
    shown = volumes(paths)
    assert shown.tumour is not None
    assert np.count_nonzero(shown.tumour) == np.count_nonzero(labels)
    brain = read_grid(tmp_path / "input" / CASE / output_name(CASE, "t2w")).volume != 0
    corner = np.maximum(np.argwhere(brain).min(axis=0) - 4, 0)
    assert np.array_equal(np.add(shown.centre, corner), (18, 14, 16))


def test_a_segmentation_that_cannot_be_used_takes_no_image_away(paths: ReportPaths, tmp_path: Path) -> None:
    path = tmp_path / "truth" / CASE / output_name(CASE, "seg")
    path.unlink()
    write_nifti(path, np.ones((4, 5, 6), np.float32), np.diag([-1, -1, 1, 1]))
    shown = volumes(paths)
    assert shown.tumour is None
    assert "no outline of the tumour" in shown.notes[0]
    assert shown.truth is not None


def test_a_segmentation_beside_the_input_serves_without_a_truth(paths: ReportPaths) -> None:
    shown = volumes(replace(paths, truth=None))
    assert shown.truth is None
    np.testing.assert_array_equal(shown.tumour, volumes(paths).tumour)


def test_a_name_that_is_no_text_hides_no_case(paths: ReportPaths) -> None:
    record = next(paths.report.glob("*.json"))
    record.write_text(json.dumps({**json.loads(record.read_text()), "case": "bad\udcff"}))
    records = read_records(paths.report)
    assert not records.faults
    assert "bad\udcff" in {entry.case for entry in records.entries}


@pytest.mark.usefixtures("no_temporary_folder")
def test_a_report_needs_no_folder_for_temporary_files(paths: ReportPaths) -> None:
    path = write_report(replace(paths, truth=None))
    assert CASE in path.read_text()
    assert [one for one in path.parent.iterdir() if one.name.endswith(".html")] == [path]


@pytest.mark.parametrize(("ending", "name"), [("spread", "spread of samples"), ("std", "predicted standard deviation")])
def test_a_standard_deviation_is_called_what_it_is(paths: ReportPaths, tmp_path: Path, ending: str, name: str) -> None:
    assert volumes(paths).std is None
    image = read_grid(paths.truth / CASE / output_name(CASE, MODALITY))
    std = np.where(image.volume != 0, np.abs(read_grid(tmp_path / "output" / output_name(CASE, MODALITY)).volume), 0)
    write_nifti(paths.report / f"{CASE}-{MODALITY}-{ending}.nii.gz", (0.1 * std).astype(np.float32), image.affine)
    path = next(paths.report.glob("*.json"))
    record = json.loads(path.read_text())
    record["quality"]["figures"] = {ending: 0.0625}
    path.write_text(json.dumps(record))
    shown = volumes(paths)
    assert shown.std_name == name
    text = write_report(paths).read_text()
    assert f"{CASE}: {name}, axial" in text
    assert "0.0625</td>" in text
    assert ("Predicted std</button>" in text, "Spread</button>" in text) == (ending == "std", ending == "spread")
    assert ("std_coverage</dt>" in text) == (ending == "std")
    if ending == "std":
        error, std = shown.difference[shown.mask][::8], shown.std[shown.mask][::8]
        assert f"<dt>std_coverage</dt><dd>{np.mean(error <= std):g}</dd>" in text
        assert f"<dt>std_rank_correlation</dt><dd>{spearmanr(error, std).statistic:g}</dd>" in text
