"""Make a test set out of complete cases: take one modality away from each."""

import logging
import shutil
from pathlib import Path

import numpy as np

from cwdm.brats import CaseFolder, find_cases
from cwdm.errors import CaseError, InputError, SettingsError
from cwdm.files import check_apart, output_errors, write_atomically

DRAWN_FROM = ("t1c", "t1n", "t2f", "t2w")
"""In the order of the published script, so that its seed makes its choice."""

_log = logging.getLogger(__name__)


def drop_modalities(data_path: Path, out: Path, seed: int, copy: bool = False) -> list[tuple[str, str]]:
    """Write OUT/<case>/ with all files of each complete case but one modality, drawn at random.

    Every case folder takes one number from the generator, so that an incomplete one, which is skipped with a
    warning in the log, does not change what the others lose. Files of the same names in OUT are replaced: with
    the same seed a second run changes nothing, with another it leaves no case complete.

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
        InputError: no case is complete, or OUT lies in the input.
        CaseError: a file cannot be read (only with `copy`).
        OutputError: OUT cannot be written.
    """
    if not 0 <= seed < 2**32:
        raise SettingsError(f"the seed should be from 0 to {2**32 - 1}, found {seed}")
    random = np.random.RandomState(seed)
    draws = [(folder, DRAWN_FROM[random.randint(0, len(DRAWN_FROM))]) for folder in find_cases(data_path)]
    complete = [(folder, modality) for folder, modality in draws if _is_complete(folder)]
    if not complete:
        raise InputError(f"no case in {data_path} has all of {', '.join(sorted(DRAWN_FROM))}; nothing to drop")
    check_apart(out, data_path)
    for folder, _ in complete:
        check_apart(out / folder.name, data_path)
        check_apart(out / folder.name, folder.folder)
    for folder, modality in complete:
        _write_case(folder, modality, out / folder.name, copy)
    return [(folder.name, modality) for folder, modality in complete]


def _is_complete(folder: CaseFolder) -> bool:
    reason = folder.problem or (folder.missing and f"{', '.join(folder.missing)} missing")
    if reason:
        _log.warning("%s is not complete and was skipped: %s", folder.name, reason)
    return not reason


def _write_case(folder: CaseFolder, dropped: str, target: Path, copy: bool) -> None:
    with output_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        for source in sorted(folder.folder.iterdir()):
            if source.name.startswith(".") or not source.is_file():
                continue
            (target / source.name).unlink(missing_ok=True)
            if source == folder.files[dropped]:
                continue
            if copy:
                _copy(folder.name, source, target / source.name)
            else:
                (target / source.name).symlink_to(source.resolve())


def _copy(case: str, source: Path, target: Path) -> None:
    try:
        file = source.open("rb")
    except OSError as error:
        raise CaseError(case, f"{source} cannot be read: {error.strerror}") from error
    with file:
        write_atomically(target, lambda copy: shutil.copyfileobj(file, copy))
