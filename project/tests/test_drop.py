"""Taking modalities away: the published choice, links, copies and an untouched input."""

import logging
from pathlib import Path

import numpy as np
import pytest

from cwdm.brats import MODALITIES, find_cases
from cwdm.drop import drop_modalities
from cwdm.errors import CwdmError, InputError, SettingsError

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
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    assert all(path.is_symlink() != copy for path in (tmp_path / "out").glob("*/*"))
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
