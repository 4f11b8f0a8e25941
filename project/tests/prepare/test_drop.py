"""Taking modalities away: the published choice, links, copies and an untouched input."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cwdm.copies import COPIES
from cwdm.errors import CwdmError, InputError, SettingsError
from cwdm.images import MODALITIES, find_cases
from cwdm.prepare.drop import drop_modalities

NAMES = [f"BraTS-GLI-{number:05d}-000" for number in (3, 20, 100, 101, 7)]


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    """Complete cases; what is in the files does not matter here."""
    for name in NAMES:
        folder = tmp_path / "in" / name
        folder.mkdir(parents=True)
        for modality in (*MODALITIES, "seg"):
            (folder / f"{name}-{modality}.nii.gz").write_text(f"{name} {modality}")
        (folder / "._junk").write_text("")
    return tmp_path / "in"


def tree(folder: Path) -> dict[str, bytes]:
    """What a person sees in a folder."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".cwdm-"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def published_choice(names: list[str], seed: int) -> list[tuple[str, str]]:
    """One draw a case, in sorted order."""
    random = np.random.RandomState(seed)
    return [(name, ("t1c", "t1n", "t2f", "t2w")[random.randint(0, 4)]) for name in sorted(names)]


@pytest.mark.parametrize("copy", [False, True])
def test_each_case_loses_the_published_modality(complete: Path, tmp_path: Path, copy: bool) -> None:
    before = tree(complete)
    pairs = drop_modalities(complete, tmp_path / "out", 123456, copy)
    assert pairs == published_choice(NAMES, 123456)
    assert len({modality for _, modality in pairs}) > 1
    assert [(case.name, *case.missing) for case in find_cases(tmp_path / "out")] == pairs
    expected = {
        name: content
        for name, content in before.items()
        if "._" not in name and not any(name == f"{case}/{case}-{modality}.nii.gz" for case, modality in pairs)
    }
    assert tree(tmp_path / "out") == expected
    assert all(path.is_symlink() != copy for path in (tmp_path / "out").glob("*/[!.]*"))
    assert tree(complete) == before


def test_the_published_seed(complete: Path, tmp_path: Path) -> None:
    """Its first draws, written out: NumPy's RandomState is frozen."""
    pairs = drop_modalities(complete, tmp_path / "out", 123456)
    assert [modality for _, modality in pairs] == ["t1n", "t2f", "t2f", "t1n", "t1c"]


def test_links_survive_a_move_and_any_working_directory(
    complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drop_modalities(Path("in"), Path("out"), 0)
    (tmp_path / "out").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    assert len(tree(tmp_path / "moved")) == 4 * len(NAMES)


@pytest.mark.parametrize("copy", [False, True])
def test_again(complete: Path, tmp_path: Path, copy: bool) -> None:
    out = tmp_path / "out"
    drop_modalities(complete, out, 1, copy)
    first = tree(out)
    drop_modalities(complete, out, 1, copy)
    assert tree(out) == first
    pairs = drop_modalities(complete, out, 2, not copy)
    assert [(case.name, *case.missing) for case in find_cases(out)] == pairs


DROP_AGAIN_AND_AGAIN = """
import sys
from pathlib import Path
from cwdm.prepare.drop import drop_modalities

name, source, out = sys.argv[1:]
sys.stdin.read()
for turn in range(15):
    for path in Path(source).glob("*/*"):
        path.write_text(f"{name} {turn} {path.name}")
    drop_modalities(Path(source), Path(out), 1, copy=True)
"""


def test_two_runs_at_a_time_lose_no_entry_of_the_copies(complete: Path, tmp_path: Path) -> None:
    """All that was ever put there can be replaced afterwards, whoever put it there."""
    case, runs = complete / NAMES[0], []
    for name in ("a", "b"):
        shutil.copytree(case, tmp_path / name / case.name)
        start = [sys.executable, "-c", DROP_AGAIN_AND_AGAIN, name, tmp_path / name, tmp_path / "out"]
        runs.append(subprocess.Popen(start, stdin=subprocess.PIPE))
    for run in runs:
        assert run.stdin
        run.stdin.close()
    for run in runs:
        run.wait(100)
    assert [run.returncode for run in runs] == [0, 0]
    assert len(json.loads((tmp_path / "out" / case.name / COPIES).read_bytes())["sha256"]) == 2 * 15 * 4


def test_an_incomplete_case_is_skipped_and_changes_no_other(
    complete: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (complete / NAMES[1] / f"{NAMES[1]}-t1c.nii.gz").unlink()
    (complete / NAMES[2] / f"{NAMES[2]}-flair.nii.gz").write_text("a second t2f")
    (complete / "notes").mkdir()
    with caplog.at_level(logging.WARNING):
        pairs = drop_modalities(complete, tmp_path / "out", 123456)
    assert pairs == [pair for pair in published_choice(NAMES, 123456) if pair[0] not in NAMES[1:3]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(name for name, _ in pairs)
    assert f"{NAMES[1]} is not complete and was skipped: t1c missing" in caplog.text
    assert f"{NAMES[2]} is not complete and was skipped: expected one file for t2f" in caplog.text


@pytest.mark.parametrize("out", ["in", "in/sub", "in/../in", "link", "link/sub"])
def test_nothing_is_written_into_the_input(complete: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "link").symlink_to(complete)
    before = tree(complete)
    with pytest.raises(InputError, match="choose another folder"):
        drop_modalities(complete, tmp_path / out, 0)
    assert tree(complete) == before
    assert not (complete / "sub").exists()


def test_links_in_the_output_do_not_lead_back_into_the_input(complete: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / NAMES[-1]).symlink_to(complete / NAMES[-1])
    before = tree(complete)
    with pytest.raises(InputError, match="choose another folder"):
        drop_modalities(complete, tmp_path / "out", 0)
    assert tree(complete) == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == [NAMES[-1]]


def test_originals_that_the_input_links_to_are_kept(complete: Path, tmp_path: Path) -> None:
    drop_modalities(complete, tmp_path / "links", 1)
    for link in sorted((tmp_path / "links").glob("*/*-seg.nii.gz")):  # one link after the other
        (tmp_path / "again").mkdir(exist_ok=True)
        (tmp_path / "again" / link.parent.name).mkdir()
        for modality in (*MODALITIES, "seg"):
            name = link.name.replace("seg", modality)
            source = link.with_name(name) if modality == "seg" else complete / link.parent.name / name
            (tmp_path / "again" / link.parent.name / name).symlink_to(source)
    before = tree(tmp_path)
    for out in (complete, tmp_path / "links"):
        with pytest.raises(InputError, match="links to a file in"):
            drop_modalities(tmp_path / "again", out, 2)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("copy", [False, True])
def test_files_that_it_did_not_write_are_kept(complete: Path, tmp_path: Path, copy: bool) -> None:
    shutil.copytree(complete, tmp_path / "backup")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"BraTS-GLI-00003-000-.* was not put there by cwdm"):
        drop_modalities(complete, tmp_path / "backup", 0, copy)
    assert tree(tmp_path) == before
    drop_modalities(complete, tmp_path / "out", 0, copy=True)
    changed = next((tmp_path / "out" / NAMES[-1]).glob("*-seg.nii.gz"))
    changed.write_text("my own")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=changed.name):
        drop_modalities(complete, tmp_path / "out", 1, copy)
    assert tree(tmp_path) == before


def test_a_flat_folder(complete: Path, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for path in complete.glob("*/BraTS*"):
        path.rename(tmp_path / "flat" / path.name)
    pairs = drop_modalities(tmp_path / "flat", tmp_path / "out", 123456)
    assert pairs == published_choice(NAMES, 123456)
    assert [(case.name, *case.missing) for case in find_cases(tmp_path / "out")] == pairs
    assert sorted(path.name for path in (tmp_path / "out" / NAMES[0]).iterdir()) == [
        f"{NAMES[0]}-{modality}.nii.gz" for modality in ("seg", "t1c", "t2f", "t2w")
    ]


@pytest.mark.parametrize("leads_to", ["nowhere", "x" * 300])
def test_a_link_that_leads_nowhere_is_no_image(
    complete: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, leads_to: str
) -> None:
    image = complete / NAMES[0] / f"{NAMES[0]}-t2w.nii.gz"
    image.unlink()
    image.symlink_to(leads_to)
    assert len(drop_modalities(complete, tmp_path / "out", 0)) == len(NAMES) - 1
    assert f"{NAMES[0]} is not complete and was skipped: {image} is no file" in caplog.text


def test_linked_case_folders_are_input_too(complete: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for name in NAMES:
        (tmp_path / "links" / name).symlink_to(complete / name)
    with pytest.raises(InputError, match="choose another folder"):
        drop_modalities(tmp_path / "links", complete, 0)
    assert len(drop_modalities(tmp_path / "links", tmp_path / "out", 0)) == len(NAMES)


def test_nothing_to_do(tmp_path: Path, complete: Path) -> None:
    drop_modalities(complete, tmp_path / "out", 0)
    with pytest.raises(InputError, match="nothing to drop"):
        drop_modalities(tmp_path / "out", tmp_path / "again", 0)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range(complete: Path, tmp_path: Path, seed: int) -> None:
    with pytest.raises(SettingsError, match=str(seed)):
        drop_modalities(complete, tmp_path / "out", seed)


def test_an_output_that_is_a_file(complete: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(CwdmError, match="cannot write to"):
        drop_modalities(complete, tmp_path / "out", 0)
