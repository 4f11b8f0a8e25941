"""Folders that appear whole or not at all, and folders that one at a time writes in."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cwdm.files import hidden_path, left_behind, output_errors


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A folder, made if there is none, for whoever reads in it and then writes by what was read: one at a time.

    Others who ask for the same folder wait until the block has ended. The lock (flock) is on the folder itself, so that
    it leaves nothing there, and goes with the process. Where the file system has no such locks, nobody waits. Whoever
    is inside a block asks for other folders alone.

    Raises:
        OutputError: it cannot be made.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def hidden_folder(parent: Path) -> Iterator[Path]:
    """A folder under a hidden name in `parent`, for what is made; it is gone with the block, or by the next run's
    `remove_stale_folders` if the process is killed.

    Raises:
        OutputError: it cannot be made.
    """
    with output_errors(parent):
        hidden = hidden_path(parent)
        hidden.mkdir()
    lock = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        os.close(lock)


def put_in_place(made: Path, place: Path) -> None:
    """Let a folder take a name at once; what had the name before takes the name that the folder had, with an ending.

    Args:
        made: inside of a `hidden_folder` on the same file system.

    Raises:
        OutputError: it cannot; what was there stays.
    """
    with output_errors(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        before = made.with_name(f"{made.name}.before")
        replaced = os.path.lexists(place)
        if replaced:
            place.rename(before)
        try:
            made.rename(place)
        except OSError:
            if replaced:
                before.rename(place)
            raise


def remove_stale_folders(parent: Path) -> None:
    """Delete the hidden folders that killed runs left; see `cwdm.files.remove_stale`.

    Raises:
        OutputError: the folder cannot be read.
    """
    for path, _ in left_behind(parent):
        with suppress(OSError):  # a process holds it, it is no folder, or it is another user's
            _remove_if_unlocked(path)


def _remove_if_unlocked(path: Path) -> None:
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)
