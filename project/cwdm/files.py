"""Files that appear whole or not at all."""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from cwdm.errors import InputError, OutputError

_HIDDEN_NAME = re.compile(r"\.cwdm-[0-9a-f]{16}\.tmp")

_NO_PERMISSION = (
    "no permission to write there; change its permissions or owner, or choose another folder; "
    'in a container, give --user "$(id -u):$(id -g)"'
)

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space and run again",
    errno.EDQUOT: "the disk quota is used up; free some space and run again",
    errno.EFBIG: "the file is larger than the system allows; raise the limit (ulimit -f) and run again",
    errno.EROFS: "it is mounted read-only; mount it writable or choose another folder",
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.ENOENT: "there is no such folder; create it first",
    errno.EEXIST: "that is a file; choose another folder",
    errno.ENOTDIR: "that is not a folder; choose another one",
}


@contextmanager
def output_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the operating system inside a `with` block into OutputError with a way out."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
        raise OutputError(f"cannot write to {folder}: {advice}") from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create or replace a file so that no one, at any moment, finds it half written.

    Where the file system can (Linux, O_TMPFILE), the file has no name until it is complete, so that
    even a killed process leaves nothing behind; elsewhere it grows under a hidden name beside `path`.
    The contents are on the disk (fsync) before the name appears; the permissions follow the umask.

    Args:
        path: the file; its folder must exist.
        write: puts the contents into the open file it is given and leaves it open.

    Raises:
        OutputError: the operating system refused (full, read-only, no permission, ...).
    """
    with output_errors(path.parent):
        unnamed = _open_unnamed(path.parent)
        if unnamed is None:
            _write_under_hidden_name(path, write)
            return
        with unnamed:
            _fill(unnamed, write)
            try:
                _give_name(unnamed, path)
            except OSError:
                # No /proc, or a file system that opens such files and then cannot name them.
                unnamed.seek(0)
                _write_under_hidden_name(path, lambda named: shutil.copyfileobj(unnamed, named))


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all; raises OutputError like `write_atomically`."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    contents = text.encode(errors="backslashreplace")  # names of files can be any bytes
    write_atomically(path, lambda file: file.write(contents))


def check_writable(folder: Path) -> None:
    """Make the folder if there is none, and prove that a file can be written into it, leaving nothing there.

    Raises:
        OutputError: it cannot.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
            file.flush()


def check_apart(target: Path, kept: Path) -> None:
    """Refuse to write into a folder that must stay as it is, such as the input.

    Raises:
        InputError: `target` is `kept` or lies inside it, links followed.
    """
    # realpath: Path.resolve raises where links go in a circle.
    if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(kept)):
        raise InputError(f"{target} lies in {kept}, where nothing else may be written; choose another folder")


def remove_stale(folder: Path) -> None:
    """Delete the hidden files that killed runs left in `folder`; those of running ones stay.

    A writer holds a lock (flock) on its file for as long as it lives, and the kernel drops the lock with
    the process. Unlike a process number in the name, that holds between containers, where every main
    process is number 1, and between hosts. What cannot be locked or deleted stays.

    Raises:
        OutputError: the folder cannot be read.
    """
    with output_errors(folder):
        for path in folder.iterdir():
            if _HIDDEN_NAME.fullmatch(path.name):
                _remove_if_abandoned(path)


def _open_unnamed(folder: Path) -> BinaryIO | None:
    """Open a file without a name in `folder`, or None where that does not exist."""
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except (AttributeError, OSError):
        # Not Linux, not this file system, or real trouble, which the hidden name will meet again and report.
        return None
    return _lock(descriptor)


def _write_under_hidden_name(path: Path, write: Callable[[BinaryIO], object]) -> None:
    hidden, file = _open_hidden(path.parent)
    with file, _removed_on_error(hidden):
        _fill(file, write)
        hidden.replace(path)


def _open_hidden(folder: Path) -> tuple[Path, BinaryIO]:
    while True:
        hidden = _hidden_path(folder)
        file = _lock(os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666))
        # A cleaner may have taken the file for abandoned in the instant before the lock.
        if os.fstat(file.fileno()).st_nlink:
            return hidden, file
        file.close()


def _give_name(unnamed: BinaryIO, path: Path) -> None:
    try:
        _link(unnamed, path)
    except FileExistsError:
        hidden = _hidden_path(path.parent)
        with _removed_on_error(hidden):
            _link(unnamed, hidden)
            hidden.replace(path)


def _link(unnamed: BinaryIO, path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # With a folder's descriptor Python calls linkat, which can follow the /proc link; link cannot.
        os.link(f"/proc/self/fd/{unnamed.fileno()}", path.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _fill(file: BinaryIO, write: Callable[[BinaryIO], object]) -> None:
    write(file)
    file.flush()
    os.fsync(file.fileno())


def _lock(descriptor: int) -> BinaryIO:
    with suppress(OSError):  # without locks remove_stale deletes nothing
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return os.fdopen(descriptor, "w+b")


def _remove_if_abandoned(path: Path) -> None:
    # An error leaves the file: a process holds it or has just finished it, or it is another user's.
    with suppress(OSError):
        if stat.S_ISREG(path.lstat().st_mode):
            with path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _hidden_path(folder: Path) -> Path:
    return folder / f".cwdm-{secrets.token_hex(8)}.tmp"


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
