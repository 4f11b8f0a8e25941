"""What a run writes about itself, read again by the same schema."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from support import spoil

from cwdm.errors import InputError
from cwdm.files import write_json
from cwdm.inference.outcome import Outcome, Quality
from cwdm.inference.record_reader import check_record_replaceable, read_records
from cwdm.inference.records import CaseRecord, WeightsOfCase, write_case_record, write_run_record

OUTCOME = Outcome(
    "P-1", "t2f", "written", "", 1.5, ("voxels of 2×2×2 mm",), Quality("look", ("noisy",), {"roughness": 0.4})
)
RECORD = CaseRecord(
    **{**vars(OUTCOME), "quality": OUTCOME.quality},
    program="cwdm 1",
    input="/in/P-1",
    output="/out/P-1-t2f.nii.gz",
    given=("t1n", "t1c"),
    weights=WeightsOfCase("any.safetensors", "ab"),
    weights_record={"modality": "any"},
    sampler="ddim",
    timesteps=(999, 0),
    device="cpu",
    precision="float32",
    settings={"seed": 42},
)

OUTCOME_KEYS = ["case", "modality", "status", "reason", "seconds", "warnings", "quality"]
CASE_KEYS = ["program", "synthesised", *OUTCOME_KEYS, "input", "output", "given", "weights", "weights_record"]
CASE_KEYS += ["sampler", "timesteps", "device", "precision", "settings"]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write_case_record(tmp_path, RECORD)
    failed = Outcome("P-2", "", "failed", "no image")
    write_run_record(tmp_path, 0.0, {"seed": 42}, [OUTCOME, failed])
    records = read_records(tmp_path)
    assert (records.cases, records.faults) == ((RECORD,), ())
    (run,) = records.runs
    assert (run.cases, run.started, run.settings) == ((OUTCOME, failed), "1970-01-01T00:00:00+00:00", {"seed": 42})


def test_keys_of_the_files_stay_in_their_order(tmp_path: Path) -> None:
    write_case_record(tmp_path, RECORD)
    case = json.loads((tmp_path / "P-1-t2f.json").read_text())
    assert list(case) == CASE_KEYS
    assert list(case["quality"]) == ["verdict", "reasons", "figures"]
    assert list(case["weights"]) == ["file", "sha256"]
    assert case["synthesised"] is True
    write_run_record(tmp_path, 0.0, {}, [OUTCOME])
    run = json.loads(next(tmp_path.glob("run-19700101T000000.000000-*.json")).read_text())
    assert list(run) == ["program", "started", "seconds", "settings", "cases"]
    assert list(run["cases"][0]) == OUTCOME_KEYS


def test_records_of_other_versions_and_other_files_are_no_obstacle(tmp_path: Path) -> None:
    old = {"case": "P-1", "modality": "t1n", "status": "written", "key_of_the_future": [1]}
    write_json(tmp_path / "P-1-t1n.json", old)
    write_json(tmp_path / "elsewhere.json", old | {"case": "../P-1"})
    write_json(tmp_path / "unknown.json", old | {"modality": "ct"})
    (tmp_path / "half.json").write_text('{"case": "P-')
    (tmp_path / "nested.json").write_text('{"case": "P-2", "settings": ' + '{"a": ' * 200 + "1" + "}" * 201)
    spoil(tmp_path / "pipe.json", "pipe")
    (tmp_path / ".hidden.json").write_text("{}")
    records = read_records(tmp_path)
    assert [(case.case, case.modality, case.settings) for case in records.cases] == [("P-1", "t1n", {})]
    names = ["elsewhere.json", "half.json", "nested.json", "pipe.json", "unknown.json"]
    assert [fault.split()[0] for fault in records.faults] == names
    assert "is not the name of a folder" in records.faults[0]


@pytest.mark.parametrize(
    "content", ["", "{}", "five!", "[" * 100_000, '{"case": "P-1", "modality": "t2f", "status": "written"}']
)
def test_only_a_record_of_a_case_may_be_replaced(content: str, tmp_path: Path) -> None:
    write_case_record(tmp_path, RECORD)
    path = tmp_path / "P-1-t2f.json"
    check_record_replaceable(path)
    path.write_text(content)
    with pytest.raises(InputError, match=r"P-1-t2f\.json is there and is no record of cwdm's"):
        check_record_replaceable(path)


def test_a_folder_without_records_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no record found"):
        read_records(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        read_records(tmp_path / "none")


def test_names_of_cases_may_be_any_bytes(tmp_path: Path) -> None:
    outcome = Outcome("caf\udce9", "t1n", "failed", "caf\udce9: no image")
    assert asdict(outcome)["case"] == "caf\udce9"
    write_run_record(tmp_path, 0.0, {}, [outcome])
    with pytest.raises(ValueError, match="name of a folder"):
        Outcome("../P-1", "t1n", "written")
