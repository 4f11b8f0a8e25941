import os
import signal
from pathlib import Path

import pytest

from cwdm.errors import OutputError
from cwdm.folders import hidden_folder, put_in_place, remove_stale_folders


def test_a_folder_takes_its_place_at_once_and_the_old_one_goes(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    for text in ("first", "second"):
        with hidden_folder(tmp_path) as hidden:
            (hidden / "made").mkdir()
            (hidden / "made" / "file").write_text(text)
            put_in_place(hidden / "made", place)
        assert (place / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_was_there_stays_where_nothing_takes_its_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OutputError), hidden_folder(tmp_path) as hidden:
        put_in_place(hidden / "never made", tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_killed_runs_leave_nothing_to_the_next_and_running_ones_keep_theirs(tmp_path: Path) -> None:
    if not (child := os.fork()):
        with hidden_folder(tmp_path) as hidden:
            (hidden / "half").write_text("made")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    with hidden_folder(tmp_path) as running:
        remove_stale_folders(tmp_path)
        assert not left.exists()
        assert running.exists()
