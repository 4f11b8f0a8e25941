"""What a report is made from: records, and the volumes that they speak of."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import link_case

from cwdm.brats import output_name
from cwdm.errors import CaseError
from cwdm.report.data import ReportPaths, read_records, read_volumes

CASE = "BraTS-PHANTOM-00000-000"


@pytest.fixture
def written(phantoms: Path, tmp_path: Path) -> ReportPaths:
    """A record of a case whose t1n is said to be synthesised; its image is the true one."""
    (tmp_path / "report").mkdir()
    (tmp_path / "output").mkdir()
    case = link_case(phantoms / CASE, tmp_path / "input", "t1n")
    output = tmp_path / "output" / output_name(CASE, "t1n")
    shutil.copy(phantoms / CASE / output_name(CASE, "t1n"), output)
    record = {"case": CASE, "modality": "t1n", "status": "written", "input": str(case), "output": str(output)}
    (tmp_path / "report" / f"{CASE}-t1n.json").write_text(json.dumps(record))
    return ReportPaths(tmp_path / "report")


def test_another_patient_in_the_folder_is_not_shown(written: ReportPaths, phantoms: Path, tmp_path: Path) -> None:
    other = "BraTS-PHANTOM-00001-000"
    (tmp_path / "flat").mkdir()
    for path in (phantoms / other).iterdir():
        (tmp_path / "flat" / path.name).symlink_to(path)
    (entry,) = read_records(written.report).entries
    with pytest.raises(CaseError, match=r"its input is not at .*flat; give --data_path"):
        read_volumes(entry, ReportPaths(written.report, data=tmp_path / "flat"))
    for path in (phantoms / CASE).iterdir():
        (tmp_path / "flat" / path.name).symlink_to(path)
    flat = read_volumes(entry, ReportPaths(written.report, data=tmp_path / "flat"))
    own = read_volumes(entry, written)
    np.testing.assert_array_equal(flat.conditions["t2w"], own.conditions["t2w"])
