"""Make a test set out of complete cases: take one modality away from each."""

import logging
from pathlib import Path

import numpy as np

from cwdm.copies import check_replaceable, put_files
from cwdm.errors import CaseError, InputError, SettingsError
from cwdm.files import check_apart, check_no_source_in
from cwdm.folders import locked
from cwdm.images import CaseFolder, case_files, find_cases

DRAWN_FROM = ("t1c", "t1n", "t2f", "t2w")
"""In the order of the published script, so that its seed makes its choice."""

_log = logging.getLogger(__name__)


def drop_modalities(data_path: Path, out: Path, seed: int, copy: bool = False) -> list[tuple[str, str]]:
    """Write OUT/<case>/ with all files of each complete case but one modality, drawn at random.

    Every case takes one number from the generator, so that an incomplete one, which is skipped with a warning in the
    log, does not change what the others lose. Links and copies that an earlier run made in OUT are replaced: with the
    same seed a second run changes nothing, with another it leaves no case complete. Other files are never replaced.

    Args:
        data_path: folder of cases; never written to.
        out: folder for the new cases.
        seed: of numpy's RandomState; 123456 makes the published choice.
        copy: copy the files instead of linking to them. Links are absolute: they survive a move of OUT, but
            do not lead out of a container that mounts OUT alone.

    Returns:
        The cases written and the modality that each of them lost, sorted by case.

    Raises:
        SettingsError: the seed is out of range.
        InputError: no case is complete, OUT lies in the input or holds what the input links to, a file in OUT is
            neither a link nor such a copy, or a file cannot be read (only with `copy`); nothing is written then, but
            in the last case.
        OutputError: OUT cannot be written.
    """
    if not 0 <= seed < 2**32:
        raise SettingsError(f"the seed should be from 0 to {2**32 - 1}, found {seed}")
    random, folders = np.random.RandomState(seed), find_cases(data_path)
    draws = {folder.name: DRAWN_FROM[random.randint(0, len(DRAWN_FROM))] for folder in folders if folder.files}
    complete = {folder.name: (folder, files) for folder in folders if (files := _all_files(folder))}
    if not complete:
        raise InputError(f"no case in {data_path} has all of {', '.join(sorted(DRAWN_FROM))}; nothing to drop")
    check_apart(out, data_path)
    for name, (folder, _) in complete.items():
        check_apart(out / name, data_path)
        check_apart(out / name, folder.folder)
    sources = (path for _, files in complete.values() for path in files.values())
    check_no_source_in([out / name for name in complete], sources)
    for name, (_, files) in complete.items():
        check_replaceable(out / name, files)
    for name, (folder, files) in complete.items():
        dropped = folder.files[draws[name]].name
        kept = {file: path for file, path in files.items() if file != dropped}
        with locked(out / name):
            put_files(kept, out / name, copy, without=[dropped])
    return [(name, draws[name]) for name in complete]


def _all_files(folder: CaseFolder) -> dict[str, Path]:
    """The files of a complete case; none of another, which is told."""
    try:
        if not folder.missing or folder.problem:
            return case_files(folder)
        reason = f"{', '.join(folder.missing)} missing"
    except CaseError as error:
        reason = error.reason
    _log.warning("%s is not complete and was skipped: %s", folder.name, reason)
    return {}
