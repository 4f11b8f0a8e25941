"""Links to files and copies of them, put into folders where they replace nothing but each other."""

import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from cwdm.errors import InputError
from cwdm.files import (
    is_file,
    is_link,
    open_file,
    output_errors,
    read_json,
    replace,
    sha256,
    write_atomically,
    write_json,
)

COPIES = ".cwdm-copies.json"
"""Beside copies of files: their sha256, by which a later run knows what it may replace."""


def check_replaceable(folder: Path, names: Iterable[str]) -> None:
    """Refuse names under which a folder holds what `put_files` did not put there.

    Links are not what is lost when they are replaced; files are, unless COPIES lists them.

    Raises:
        InputError: one is in use.
        OutputError: the folder cannot be read.
    """
    with output_errors(folder):
        for path in (folder / name for name in names):
            try:
                mode = path.lstat().st_mode
                if stat.S_ISLNK(mode) or (stat.S_ISREG(mode) and _is_copy(path)):
                    continue
            except (FileNotFoundError, NotADirectoryError):
                continue
            raise InputError(
                f"{path} is there and was not put there by cwdm, or has changed since; "
                "move it away, or choose another folder for the output"
            )


def put_files(
    sources: Mapping[str, Path],
    folder: Path,
    copy: bool = False,
    without: Collection[str] = (),
    between: Callable[[], None] = lambda: None,
) -> None:
    """Link to files, or copy them, under the names given; what else is in the folder stays.

    Each name changes at once, and only links and copies that were put there before are replaced. Links are absolute
    and lead to the file itself. Who else may write there at the same time should be kept out: see `folders.locked`.

    Args:
        sources: name in the folder -> file.
        folder: is made if there is none.
        without: names of earlier links and copies to take away.
        between: called when these are gone and the others are not there yet.

    Raises:
        InputError: a name is in use by something else, then nothing is changed; or a source cannot be read.
        OutputError: the folder cannot be written.
    """
    check_replaceable(folder, (*sources, *without))
    digests = {name: _sha256_of_source(source) for name, source in sources.items()} if copy else {}
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if new := set(digests.values()) - (before := _copied(folder)):
            # Ahead of the copies, and with the old ones, so that a run that is killed among them can be run again.
            write_json(folder / COPIES, {"sha256": sorted(before | new)})
        for name in without:
            (folder / name).unlink(missing_ok=True)
        between()
        for name, source in sources.items():
            if copy:
                _copy(source, folder / name, digests[name])
            else:
                _link_to(source, folder / name)


def _is_copy(path: Path) -> bool:
    """Whether a file was put there; the list is read last, because another run adds to it before it puts a file."""
    return bool(_copied(path.parent)) and sha256(path) in _copied(path.parent)


def _copied(folder: Path) -> set[str]:
    """Checksums of the copies that were put into a folder."""
    try:
        return set(map(str, read_json(folder / COPIES)["sha256"]))
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _sha256_of_source(source: Path) -> str:
    try:
        return sha256(source)
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}") from error


def _copy(source: Path, target: Path, digest: str) -> None:
    if not is_link(target) and is_file(target) and sha256(target) == digest:
        return
    try:
        file = open_file(source)
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}") from error
    with file:
        write_atomically(target, lambda copy: shutil.copyfileobj(file, copy))


def _link_to(source: Path, target: Path) -> None:
    replace(target, lambda hidden: hidden.symlink_to(os.path.realpath(source)))
