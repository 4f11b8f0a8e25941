"""Folders for temporary files, on machines that may have no place for them."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cwdm.errors import OutputError
from cwdm.files import output_errors


def check_temporary() -> None:
    """Prove that there is a folder for temporary files.

    Raises:
        OutputError: none of those that the system names can be written to.
    """
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise OutputError(
            f"no folder for temporary files can be written to ({error.strerror}); name one: TMPDIR=FOLDER"
        ) from error


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is gone with the block; raises OutputError where none can be made."""
    check_temporary()
    with output_errors(Path(tempfile.gettempdir())):
        made = tempfile.TemporaryDirectory(prefix="cwdm-")
    with made as name:
        yield Path(name)
