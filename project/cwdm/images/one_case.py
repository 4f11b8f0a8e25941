"""One case without a search for others: the one in a folder, and all that belongs to it."""

from pathlib import Path

from cwdm.errors import CaseError, InputError
from cwdm.files import is_file
from cwdm.images.cases import NAMES, CaseFolder, flat_cases, list_folder, look_into


def case_folder(folder: Path, name: str = "") -> CaseFolder:
    """The case in one folder, whose faults wait in `CaseFolder.problem`.

    Args:
        name: of the case, where the folder may hold several, flat.

    Raises:
        InputError: the folder holds no file of any modality, or is none.
    """
    folder = folder.absolute()  # "." has no name
    case = look_into(folder)
    if name and case is not None:
        case = next((one for one in flat_cases(folder, list_folder(folder, "images")) if one.name == name), case)
    if case is None or not case.files:
        expected = f"expected a folder with files like <case>-t1n.nii.gz (one of {NAMES}, .nii or .nii.gz)"
        raise InputError(f"no case found in {folder}; {(case and case.problem) or expected}")
    return case


def case_files(case: CaseFolder) -> dict[str, Path]:
    """Name -> file, of all that belongs to a case: what its folder holds or, in a flat one, images and segmentation.

    Raises:
        CaseError: the case cannot be used, or there is nothing behind the name of one of its images.
        InputError: the folder cannot be read.
    """
    if case.problem is not None:
        raise CaseError(case.name, case.problem)
    if broken := [path for path in case.files.values() if not is_file(path)]:
        raise CaseError(
            case.name, f"{broken[0]} is no file, leads nowhere or may not be looked at; repair it or take it away"
        )
    if case.flat:
        segmentations = (case.folder / f"{case.name}{join}seg.nii{gz}" for join in "-_." for gz in (".gz", ""))
        paths = [*case.files.values(), *segmentations]
    else:
        paths = [path for path in list_folder(case.folder, "images") if not path.name.startswith(".")]
    return {path.name: path for path in paths if is_file(path)}
