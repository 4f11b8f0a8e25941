"""A run's folder, in which one run is at work at a time."""

import fcntl
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from cwdm.errors import SettingsError
from cwdm.files import check_apart, check_writable

PATIENCE_S = 15
"""How long the run before may take to leave, as when a scheduler starts it again."""


@contextmanager
def held(out: Path, kept: Iterable[Path]) -> Iterator[None]:
    """A block in which no other run works in the folder: two would write each other's states and weights.

    A killed run holds nothing. Where the file system knows no locks, nothing is held.

    Args:
        kept: folders of data, where nothing may be written.

    Raises:
        SettingsError: another run is at work there.
        InputError: it lies in one of those that are kept.
        OutputError: the folder cannot be written.
    """
    for folder in kept:
        check_apart(out, folder)
    check_writable(out)
    with (out / "lock").open("a+") as file:
        until = time.monotonic() + PATIENCE_S
        while not _lock(file):
            if time.monotonic() > until:
                file.seek(0)
                raise SettingsError(
                    f"{file.read() or 'another run'} is at work in {out}; wait for its end, stop it, or choose another "
                    "folder"
                )
            time.sleep(0.5)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _lock(file: TextIO) -> bool:
    """Whether the file is this process's. Not flock's: processes that read the data would inherit that."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True
