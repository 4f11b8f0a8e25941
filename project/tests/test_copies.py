"""Links and copies: what they replace, and what they never do."""

from pathlib import Path

import pytest
from support import hostile, spoil

from cwdm.copies import COPIES, put_files
from cwdm.errors import InputError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"original")
    return path


@pytest.mark.parametrize("copy", [False, True])
def test_put_and_take_away_again(source: Path, tmp_path: Path, copy: bool) -> None:
    folder = tmp_path / "a" / "b"
    put_files({"x": source, "y": source}, folder, copy)
    assert (folder / "x").is_symlink() is not copy
    assert (folder / "x").read_bytes() == (folder / "y").read_bytes() == b"original"
    source.write_bytes(b"another")
    put_files({"x": source}, folder, copy, without=["y"])
    assert (folder / "x").read_bytes() == b"another"
    assert not (folder / "y").exists()
    put_files({"x": source}, folder, not copy)
    assert (folder / "x").is_symlink() is copy
    assert (folder / "x").read_bytes() == source.read_bytes() == b"another"
    assert not list(folder.glob(".cwdm-*.tmp"))


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("there", ["file", "folder", "same content", "changed copy"])
def test_what_was_not_put_there_stays(source: Path, tmp_path: Path, copy: bool, there: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    if there == "folder":
        (folder / "y").mkdir()
    else:
        if there == "changed copy":
            put_files({"y": source}, folder, copy=True)
        (folder / "y").write_bytes(b"original" if there == "same content" else b"my own")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for sources, without in (({"x": source, "y": source}, ()), ({"x": source}, ("y",))):
        with pytest.raises(InputError, match=f"{folder / 'y'} is there"):
            put_files(sources, folder, copy, without)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_run_killed_among_its_copies_can_be_run_again(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    put_files({"x": source, "y": source}, folder, copy=True)
    source.write_bytes(b"another")
    (tmp_path / "missing").symlink_to("nowhere")
    with pytest.raises(InputError, match="cannot be read"):
        put_files({"x": source, "y": tmp_path / "missing"}, folder, copy=True)
    put_files({"x": source}, folder, copy=True)  # y is still the old one
    put_files({"x": source, "y": source}, folder, copy=True)
    assert (folder / "y").read_bytes() == b"another"


@pytest.mark.parametrize("content", ["", "[]", '{"sha256": 3}', "{", '"\\ud800"'])
def test_a_damaged_list_of_copies_makes_no_file_replaceable(source: Path, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "out"
    put_files({"x": source}, folder, copy=True)
    (folder / COPIES).write_text(content)
    with pytest.raises(InputError, match="was not put there by cwdm"):
        put_files({"x": source}, folder)


@hostile
def test_a_hostile_list_of_copies_makes_no_file_replaceable(source: Path, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "out"
    put_files({"x": source}, folder, copy=True)
    spoil(folder / COPIES, how)
    with pytest.raises(InputError, match="was not put there by cwdm"):
        put_files({"x": source}, folder)
