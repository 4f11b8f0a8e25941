"""Why a folder is no case, or holds none, and what was expected there."""

import os
from collections.abc import Iterable
from pathlib import Path

from cwdm.images.cases import NAMES, output_name, split_name
from cwdm.images.recognise import has_nifti_name


def no_case_among(data_path: Path, entries: Iterable[Path]) -> str:
    """What should be in a folder of cases, and what is."""
    if any(split_name(entry.name) for entry in entries):
        return (
            f"{data_path} holds the files of a case itself; give the folder above it "
            f"({Path(os.path.realpath(data_path)).parent}), where each case has a folder of its own"
        )
    there = [entry.name for entry in entries]
    found = f"; found {', '.join(there[:3])}{' and more' if len(there) > 3 else ''}" if there else ", found nothing"
    return (
        f"no case found in {data_path}; expected folders with files like "
        f"<case>/<case>-t1n.nii.gz (one of {NAMES}, .nii or .nii.gz){found}"
    )


def unrecognised(folder: Path, paths: Iterable[Path]) -> str | None:
    """Why a folder without a file of any modality seems to be meant as a case all the same."""
    if found := [path.name for path in paths if has_nifti_name(path.name)]:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        return (
            f"expected files like {output_name(folder.name, 't1n')} (one of {NAMES}, .nii or .nii.gz), "
            f"found {', '.join(found[:3])}{more}; rename them"
        )
    for below, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(map(has_nifti_name, names)):
            return f"expected its files in {folder} itself, found some in {below}; give each case one folder"
    return None
