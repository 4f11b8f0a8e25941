"""Files that appear whole or not at all, and folders that they may be written into."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from cwdm.errors import InputError, NameInUseError, OutputError

# Earlier versions named neither the machine nor the process.
HIDDEN_NAME = re.compile(r"\.cwdm-(?:(?P<machine>[0-9a-f]{8})-\d+-)?[0-9a-f]{16}\.tmp")

STALE_SECONDS = 24 * 3600
"""Age of a hidden file that no writer on another machine can still be at; the largest take minutes."""

MOST_BYTES = 64 << 20
"""Of one JSON file; a run's record has about 300 a case."""

MOST_LEVELS = 64
"""Of lists and objects inside each other in JSON: ours have ten at most, and Python can follow but hundreds."""

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

_NAME_IN_USE = {
    errno.EISDIR: "a folder has that name; move it away",
    errno.ENAMETOOLONG: "the name is longer than the system allows; shorten it",
}


@contextmanager
def output_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the operating system inside a `with` block into OutputError with a way out."""
    try:
        yield
    except OSError as error:
        code = error.errno or 0
        if code in _NAME_IN_USE:
            name = error.filename2 or error.filename or folder
            raise NameInUseError(f"cannot write {os.fsdecode(name)}: {_NAME_IN_USE[code]}") from error
        advice = _ADVICE.get(code, error.strerror or str(error))
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
        NameInUseError: a folder has the name, or the name is too long.
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


def replace(path: Path, make: Callable[[Path], object]) -> None:
    """Make something under a hidden name beside `path`, then let it take that name at once."""
    hidden = hidden_path(path.parent)
    with _removed_on_error(hidden):
        make(hidden)
        hidden.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all; raises OutputError like `write_atomically`."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    contents = text.encode(errors="backslashreplace")  # names of files can be any bytes
    write_atomically(path, lambda file: file.write(contents))


# Path.exists and the like raise where a folder may not be entered, a name is too long or links lead to such a name;
# these answer as the shell does.


def is_file(path: Path) -> bool:
    """Whether there is a regular file that we can get at, links followed; raises nothing."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Whether there is a folder that we can get at, links followed; raises nothing."""
    return os.path.isdir(path)  # noqa: PTH112


def exists(path: Path) -> bool:
    """Whether there is anything that we can get at, links followed; raises nothing."""
    return os.path.exists(path)  # noqa: PTH110


def is_link(path: Path) -> bool:
    """Whether there is a link that we can get at; raises nothing."""
    return os.path.islink(path)  # noqa: PTH114


def matching(folder: Path, pattern: str) -> list[Path]:
    """What in a folder matches a pattern as of the shell, sorted; what cannot be looked at is not there."""
    return sorted(folder / name for name in glob.glob(pattern, root_dir=folder, include_hidden=True))  # noqa: PTH207


def files_below(folder: Path) -> list[Path]:
    """The files in a folder and its folders, sorted; links to files followed, those to folders not."""
    places = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    return sorted(path for path in places if is_file(path))


def open_file(path: Path) -> BufferedReader:
    """A regular file, open for reading; opening a pipe would wait for ever.

    Raises:
        OSError: it cannot be read, or is none.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")  # noqa: PTH123  # a descriptor, not a path
    os.close(descriptor)
    raise OSError(errno.EINVAL, "is not a regular file", os.fspath(path))


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """What a JSON file holds, which may be anyone's.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is not JSON, or too large or too deeply nested to be ours.
    """
    with open_file(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"larger than {most_bytes:,} bytes, which no file of ours is")
    return parse_json(content)


def parse_json(text: str | bytes) -> Any:
    """The value of a text; raises ValueError where it is not JSON or nested more than MOST_LEVELS deep."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [value]
    for _ in range(MOST_LEVELS):
        inside = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [item for items in inside for item in items]
        if not level:
            return value
    raise ValueError("nested too deeply")


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
        InputError: `target` is `kept` or lies inside it, links and mounts followed.
    """
    # realpath: Path.resolve raises where links go in a circle.
    real, same = Path(os.path.realpath(target)), _identity(kept)
    mounted_twice = same is not None and same in map(_identity, (real, *real.parents))
    if mounted_twice or real.is_relative_to(os.path.realpath(kept)):
        raise InputError(f"{target} lies in {kept}, where nothing else may be written; choose another folder")


def check_no_source_in(folders: Iterable[Path], sources: Iterable[Path]) -> None:
    """Refuse to write into folders where one of the sources lies, or a file that it links to.

    What is replaced in such a folder may be the very file that is read, or the only one that a link leads to.

    Raises:
        InputError: one does.
    """
    written = {_identity(folder) for folder in folders} - {None}
    for source in sources if written else ():
        if there := [hop.parent for hop in _hops(source) if _identity(hop.parent) in written]:
            raise InputError(
                f"{source} lies in, or links to a file in, {there[0]}, where files would be replaced; "
                "choose another folder for the output"
            )


def sha256(path: Path) -> str:
    """Checksum of a regular file's contents; raises OSError."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_stale(folder: Path) -> None:
    """Delete the hidden files that killed runs left in `folder`; those of running ones stay.

    A writer holds a lock (flock) on its file for as long as it lives, and the kernel drops the lock with the process.
    That tells of every writer on this machine, in whatever container. Of those on another machine it tells nothing
    where locks stay within a machine, as on many shared file systems: their files are deleted by age alone.
    What cannot be deleted stays.

    Raises:
        OutputError: the folder cannot be read.
    """
    for path, status in left_behind(folder):
        with suppress(OSError):  # a process holds it or has just finished it, or it is another user's
            if stat.S_ISREG(status.st_mode):
                with path.open("r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


def left_behind(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Hidden files and folders whose makers may be gone: those of this machine, of others the old ones.

    Raises:
        OutputError: the folder cannot be read.
    """
    with output_errors(folder), os.scandir(folder) as entries:
        found = [(Path(entry), match) for entry in entries if (match := HIDDEN_NAME.fullmatch(entry.name))]
    for path, match in found:
        with suppress(OSError):
            status = path.lstat()
            if match["machine"] == machine() or time.time() - status.st_mtime > STALE_SECONDS:
                yield path, status


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
        try:
            hidden.replace(path)
        except FileNotFoundError as error:
            raise OutputError(
                f"cannot write {path}: {hidden.name} vanished while it was written; "
                "see what else deletes files there and run again"
            ) from error


def _open_hidden(folder: Path) -> tuple[Path, BinaryIO]:
    while True:
        hidden = hidden_path(folder)
        file = _lock(os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666))
        # A cleaner may have taken the file for abandoned in the instant before the lock.
        if os.fstat(file.fileno()).st_nlink:
            return hidden, file
        file.close()


def _give_name(unnamed: BinaryIO, path: Path) -> None:
    try:
        _link(unnamed, path)
    except FileExistsError:
        replace(path, lambda hidden: _link(unnamed, hidden))


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


def hidden_path(folder: Path) -> Path:
    """A name that nobody has, by which `remove_stale` knows whose it is."""
    return folder / f".cwdm-{machine()}-{os.getpid()}-{secrets.token_hex(8)}.tmp"


@cache
def machine() -> str:
    """Eight digits for the running kernel: the same in all its containers, others after a restart."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        identity = socket.gethostname().encode()
    return hashlib.sha256(identity).hexdigest()[:8]


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


# Which folder, and where links lead


def _identity(folder: Path) -> tuple[int, int] | None:
    """What a folder keeps under another name, as where a container mounts it twice; None if there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _hops(path: Path) -> Iterator[Path]:
    """A file and what it links to, one link after the other, each in its real folder."""
    for _ in range(40):  # as many as Linux follows
        path = Path(os.path.realpath(path.parent), path.name)
        yield path
        if not is_link(path):
            return
        path = path.parent / path.readlink()
