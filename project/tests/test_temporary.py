"""Folders for temporary files, and machines without any."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cwdm.cli.app import app
from cwdm.errors import OutputError
from cwdm.temporary import check_temporary, temporary_folder


@pytest.mark.usefixtures("no_temporary_folder")
def test_no_folder_for_temporary_files_is_said() -> None:
    for use in (check_temporary, lambda: temporary_folder().__enter__()):
        with pytest.raises(OutputError, match=r"no folder for temporary files .* TMPDIR=FOLDER"):
            use()


def test_a_temporary_folder_is_gone_with_its_block() -> None:
    with temporary_folder() as folder:
        (folder / "file").touch()
    assert not folder.exists()


@pytest.mark.usefixtures("no_temporary_folder")
@pytest.mark.parametrize("command", ["self-test --weights bundled", "train cwdm-any data.path={0} out={0}/run"])
def test_commands_that_need_one_say_so(command: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="TMPDIR=FOLDER"):
        CliRunner().invoke(app, command.format(tmp_path).split(), catch_exceptions=False)
