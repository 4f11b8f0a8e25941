"""Completed case folders: what is in them, how the synthesised image is marked, and that the input stays as it is."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import hostile, link_to_a_name_too_long, spoil
from typer.testing import CliRunner

from cwdm import __version__
from cwdm.cli.app import app
from cwdm.errors import InputError
from cwdm.images import find_cases, output_name, read_case, read_volume, write_nifti, write_volume
from cwdm.prepare.complete import complete_cases
from cwdm.prepare.drop import drop_modalities
from cwdm.runner import Outcome


@pytest.fixture
def synthesised(cohort: Path, tmp_path: Path) -> Path:
    """What `cwdm infer` would write for `cohort`, without a network."""
    folder = tmp_path / "output"
    folder.mkdir()
    for found in find_cases(cohort):
        case = read_case(found)
        write_volume(folder / output_name(case.name, case.target), case.volumes["t1c"] / 2, case)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """What a person sees in a folder."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".cwdm-"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("copy", [False, True])
def test_completed_folders(cohort: Path, synthesised: Path, tmp_path: Path, copy: bool) -> None:
    before = tree(cohort), tree(synthesised)
    out = tmp_path / "complete"
    done = complete_cases(cohort, synthesised, out, copy)
    assert done == [
        Outcome(folder.name, "written", "", (f"its {folder.missing[0]} is synthesised, not acquired",))
        for folder in find_cases(cohort)
    ]
    missing = {folder.name: folder.missing for folder in find_cases(cohort)}
    for folder in find_cases(out):
        assert folder.missing == ()
        (modality,) = missing[folder.name]
        image = synthesised / output_name(folder.name, modality)
        record = json.loads((folder.folder / f"{folder.name}-synthesised.json").read_text())
        assert record["program"] == f"cwdm {__version__}"
        assert record["synthesised"] == [
            {
                "modality": modality,
                "file": image.name,
                "sha256": hashlib.sha256(image.read_bytes()).hexdigest(),
                "header": f"synthesised by cwdm {__version__} ({modality})",
            }
        ]
        assert modality not in record["originals"]
        assert np.array_equal(read_volume(folder.files[modality]), read_volume(image))
        links = {path.name: path.is_symlink() for path in folder.folder.glob("[!.]*")}
        assert links.pop(f"{folder.name}-synthesised.json") is False
        assert set(links.values()) == {not copy}
        originals = {path.name for path in (cohort / folder.name).iterdir()}
        assert links.keys() == originals | {image.name}
    assert (tree(cohort), tree(synthesised)) == before


def test_again_replaces_and_changes_no_original(cohort: Path, synthesised: Path, tmp_path: Path) -> None:
    out = tmp_path / "complete"
    complete_cases(cohort, synthesised, out)
    first, before = tree(out), tree(cohort)
    complete_cases(cohort, synthesised, out, copy=True)
    assert tree(out) == first
    assert tree(cohort) == before


@pytest.mark.parametrize("copy", [False, True])
def test_again_with_other_synthesised_images(cohort: Path, synthesised: Path, tmp_path: Path, copy: bool) -> None:
    out = tmp_path / "complete"
    complete_cases(cohort, synthesised, out, copy)
    for found in find_cases(cohort):
        case = read_case(found)
        write_volume(synthesised / output_name(case.name, case.target), case.volumes["t1c"] / 3, case)
    assert not [one.reason for one in complete_cases(cohort, synthesised, out, copy) if one.reason]
    for image in synthesised.iterdir():
        (completed,) = out.glob(f"*/{image.name}")
        assert completed.read_bytes() == image.read_bytes()


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("arrives", [True, False])
def test_no_image_stays_that_the_new_record_does_not_name(
    cohort: Path, synthesised: Path, phantoms: Path, tmp_path: Path, copy: bool, arrives: bool
) -> None:
    out, case = tmp_path / "complete", find_cases(cohort)[0]
    complete_cases(cohort, synthesised, out, copy)
    (lost,) = case.missing
    old, other = output_name(case.name, lost), output_name(case.name, "t2w")
    if arrives:  # under a name of its own, so that both would stand there
        (case.folder / f"{case.name}-t1.nii.gz").symlink_to(phantoms / case.name / old)
        case.files["t2w"].unlink()
        (synthesised / other).write_bytes((synthesised / old).read_bytes())
    else:
        moved = case.files["t2w"].rename(case.folder / f"{case.name}-t2.nii.gz")
    assert complete_cases(cohort, synthesised, out, copy)[0].status == "written"
    completed = find_cases(out)[0]
    assert (completed.problem, completed.missing) == (None, ())
    record = json.loads((out / case.name / f"{case.name}-synthesised.json").read_text())
    assert [one["file"] for one in record["synthesised"]] == [other if arrives else old]
    gone, here = (old, other) if arrives else (other, moved.name)
    there = {path.name for path in (out / case.name).iterdir()}
    assert gone not in there
    assert here in there


def test_an_old_image_that_was_changed_since_is_kept(
    cohort: Path, synthesised: Path, phantoms: Path, tmp_path: Path
) -> None:
    out, case = tmp_path / "complete", find_cases(cohort)[0]
    complete_cases(cohort, synthesised, out, copy=True)
    old = output_name(case.name, *case.missing)
    (out / case.name / old).write_text("my own")
    (case.folder / f"{case.name}-t1.nii.gz").symlink_to(phantoms / case.name / old)
    case.files["t2w"].unlink()
    (synthesised / output_name(case.name, "t2w")).write_bytes((synthesised / old).read_bytes())
    before = tree(out / case.name)
    failed = complete_cases(cohort, synthesised, out, copy=True)[0]
    assert failed.status == "failed"
    assert f"{out / case.name / old} is there and was not put there by cwdm" in failed.reason
    assert tree(out / case.name) == before


@pytest.mark.parametrize("names", [["\ud800", "../../outside", "x" * 300], [["list"]], 3])
def test_a_record_with_odd_names_takes_nothing_away(
    cohort: Path, synthesised: Path, tmp_path: Path, names: object
) -> None:
    out, case = tmp_path / "complete", find_cases(cohort)[0]
    complete_cases(cohort, synthesised, out)
    path = out / case.name / f"{case.name}-synthesised.json"
    record = json.loads(path.read_text())
    told = [{"file": name} for name in names] if isinstance(names, list) else names
    path.write_text(json.dumps({**record, "synthesised": told}))
    (tmp_path / "outside").touch()
    assert complete_cases(cohort, synthesised, out)[0].status == "written"
    assert json.loads(path.read_text()) == record
    assert (tmp_path / "outside").exists()


def test_originals_that_the_input_links_to_are_kept(phantoms: Path, tmp_path: Path) -> None:
    shutil.copytree(phantoms, tmp_path / "complete")
    drop_modalities(tmp_path / "complete", tmp_path / "input", 123456)
    (tmp_path / "output").mkdir()
    for found in find_cases(tmp_path / "input"):
        case = read_case(found)
        write_volume(tmp_path / "output" / output_name(case.name, case.target), case.volumes[case.nearest] / 2, case)
    before = tree(tmp_path)
    arguments = ["complete", str(tmp_path / "input"), str(tmp_path / "complete")]
    done = CliRunner().invoke(app, [*arguments, "--synthesised", str(tmp_path / "output")])
    assert isinstance(done.exception, InputError)
    assert "links to a file in" in str(done.exception)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("copy", [False, True])
def test_files_that_it_did_not_write_are_kept(cohort: Path, synthesised: Path, tmp_path: Path, copy: bool) -> None:
    out = tmp_path / "complete"
    first, second, third = find_cases(cohort)
    own = out / first.name / f"{first.name}-seg.nii.gz"
    record = out / second.name / f"{second.name}-synthesised.json"
    for path in (own, record):
        path.parent.mkdir(parents=True)
        path.write_text("my own")
    done = complete_cases(cohort, synthesised, out, copy)
    assert f"{own} is there and was not put there by cwdm" in done[0].reason
    assert f"{record} is there and was not put there by cwdm" in done[1].reason
    assert (done[2].name, done[2].status) == (third.name, "written")
    assert [path.read_text() for path in out.glob("*/*") if path.parent.name != third.name] == ["my own"] * 2


def test_a_flat_folder(cohort: Path, synthesised: Path, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for path in cohort.glob("*/*"):
        path.rename(tmp_path / "flat" / path.name)
    done = complete_cases(tmp_path / "flat", synthesised, tmp_path / "complete")
    assert [one.reason for one in done] == ["", "", ""]
    for folder in find_cases(tmp_path / "complete"):
        assert folder.missing == ()
        assert len(list(folder.folder.glob("*.nii.gz"))) == 5


def test_one_bad_case_stops_no_other(cohort: Path, synthesised: Path, tmp_path: Path) -> None:
    bad, wrong, good = find_cases(cohort)
    (synthesised / output_name(bad.name, *bad.missing)).unlink()
    write_nifti(synthesised / output_name(wrong.name, *wrong.missing), np.eye(9, dtype=np.int16)[None], np.eye(4))
    done = CliRunner().invoke(
        app, ["complete", str(cohort), str(tmp_path / "out"), "--synthesised", str(synthesised)], catch_exceptions=False
    )
    assert done.exit_code == 1
    assert f"{bad.name} FAILED: expected its synthesised {bad.missing[0]}" in done.stderr
    assert f"{wrong.name} FAILED: expected volumes of one shape" in done.stderr
    assert f"{good.name} written\n    warning: its {good.missing[0]} is synthesised, not acquired" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [good.name]


def test_a_link_to_a_name_too_long_stops_no_other_case(cohort: Path, synthesised: Path, tmp_path: Path) -> None:
    bad, *good = find_cases(cohort)
    link_to_a_name_too_long(next(iter(bad.files.values())))
    done = complete_cases(cohort, synthesised, tmp_path / "out")
    assert [one.status for one in done] == ["failed", *["written"] * len(good)]
    assert "leads nowhere" in done[0].reason or "cannot be read" in done[0].reason


@hostile
def test_a_hostile_record_in_its_place_is_kept(cohort: Path, synthesised: Path, tmp_path: Path, how: str) -> None:
    name = find_cases(cohort)[0].name
    (tmp_path / "out" / name).mkdir(parents=True)
    spoil(tmp_path / "out" / name / f"{name}-synthesised.json", how)
    done = complete_cases(cohort, synthesised, tmp_path / "out")
    assert [one.status for one in done] == ["failed", "written", "written"]
    assert "was not put there by cwdm" in done[0].reason


def test_cases_that_miss_nothing_or_too_much(cohort: Path, phantoms: Path, synthesised: Path, tmp_path: Path) -> None:
    first, second, _ = find_cases(cohort)
    name = output_name(first.name, *first.missing)
    (cohort / first.name / name).symlink_to(phantoms / first.name / name)
    second.files["t1c"].unlink()
    reasons = [one.reason for one in complete_cases(cohort, synthesised, tmp_path / "out")]
    assert "found all four" in reasons[0]
    assert "expected its synthesised t1c" in reasons[1]
    assert reasons[2] == ""


def test_several_missing_modalities_are_put_in_together(cohort: Path, synthesised: Path, tmp_path: Path) -> None:
    second = find_cases(cohort)[1]
    (lost,) = second.missing
    second.files["t1c"].unlink()
    image = synthesised / output_name(second.name, lost)
    (synthesised / output_name(second.name, "t1c")).write_bytes(image.read_bytes())
    done = complete_cases(cohort, synthesised, tmp_path / "out")[1]
    assert (done.status, done.warnings) == ("written", (f"its t1c and {lost} are synthesised, not acquired",))
    assert find_cases(tmp_path / "out")[1].missing == ()
    record = json.loads((tmp_path / "out" / second.name / f"{second.name}-synthesised.json").read_text())
    assert [one["modality"] for one in record["synthesised"]] == ["t1c", lost]
    assert sorted(record["originals"]) == ["t1n", "t2w"]


def test_a_synthesised_image_must_be_sound(cohort: Path, synthesised: Path, tmp_path: Path) -> None:
    images = sorted(synthesised.iterdir())
    images[0].write_bytes(images[0].read_bytes()[:500])
    case = read_case(find_cases(cohort)[1])
    write_volume(images[1], np.zeros_like(case.volumes["t1c"]), case)
    reasons = [one.reason for one in complete_cases(cohort, synthesised, tmp_path / "out")]
    assert "too early" in reasons[0]
    assert "every voxel is 0" in reasons[1]


def test_an_image_that_cwdm_did_not_synthesise_is_not_put_in(
    cohort: Path, synthesised: Path, phantoms: Path, tmp_path: Path
) -> None:
    case = find_cases(cohort)[0]
    image = synthesised / output_name(case.name, *case.missing)
    image.write_bytes((phantoms / case.name / image.name).read_bytes())
    outcomes = complete_cases(cohort, synthesised, tmp_path / "out")
    assert [one.status for one in outcomes] == ["failed", "written", "written"]
    assert f"{image} was not synthesised by cwdm" in outcomes[0].reason
    assert not (tmp_path / "out" / case.name).exists()


@pytest.mark.parametrize("out", ["input", "input/sub", "output", "link"])
def test_nothing_is_written_into_what_is_read(cohort: Path, synthesised: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "link").symlink_to(cohort)
    before = tree(tmp_path)
    with pytest.raises(InputError, match="choose another folder"):
        complete_cases(cohort, synthesised, tmp_path / out)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / find_cases(cohort)[-1].name).symlink_to(find_cases(cohort)[-1].folder)
    with pytest.raises(InputError, match="choose another folder"):
        complete_cases(cohort, synthesised, tmp_path / "elsewhere")
    assert {name: content for name, content in tree(tmp_path).items() if "elsewhere" not in name} == before
