"""BraTS case folders: which files are a case's, and its volumes; no module outside `images` knows file names.

A case is a folder, and its name is the folder's. Files are recognised by their endings, as in
`BraTS-GLI-00001-000-t1n.nii.gz`, `BraTS20_Training_001_flair.nii` or plain `t2.nii.gz`.
"""

import errno
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from cwdm import __version__
from cwdm.arrays import Affine, Volume
from cwdm.errors import CaseError, InputError
from cwdm.files import is_file
from cwdm.images.grids import check_same_grid, spacing_mm
from cwdm.images.nifti import FileError, affine_of, by, is_oriented, load, shape_of, write

MODALITIES = ("t1n", "t1c", "t2w", "t2f")
"""In the order in which the networks take them."""

MOST_SIMILAR = {"t1n": "t1c", "t1c": "t1n", "t2w": "t2f", "t2f": "t2w"}
"""The modality that looks most like each."""

_ALIASES = {"t1": "t1n", "t1ce": "t1c", "t1gd": "t1c", "t2": "t2w", "flair": "t2f"}
_ENDINGS = "|".join((*MODALITIES, *_ALIASES))
_FILE_NAME = re.compile(rf"(?:(.*)[-_.])?({_ENDINGS})\.nii(?:\.gz)?", re.IGNORECASE | re.DOTALL)
NAMES = f"{', '.join(MODALITIES)} or the old {', '.join(_ALIASES)}"

_SYSTEM_FOLDERS = {"lost+found", "System Volume Information", "$RECYCLE.BIN"}
"""What systems put into disks and shares, and let nobody read."""

LONGEST_NAME = 255  # bytes that file systems allow
_LONGEST_ENDING = "-t1n-spread.nii.gz"  # that a file named after a case gets
_LONGEST_DESCRIPTION = 79  # characters, and a zero behind them
_USUAL_SHAPE = (240, 240, 155)

MARK = "synthesised by cwdm"
"""How the description begins in the header of what is written here."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaseFolder:
    """Files of one case, not read yet.

    Args:
        name: the folder's name or, in a flat folder, what its files' names begin with.
        folder: where they are.
        files: modality -> file; segmentations and everything else are left out.
        problem: why the case cannot be used, found while looking; `read_case` reports it.
        chosen: what to synthesise where several modalities are missing.
        flat: whether the folder holds other cases' files too.
    """

    name: str
    folder: Path
    files: dict[str, Path]
    problem: str | None = None
    chosen: str = ""
    flat: bool = False

    @property
    def missing(self) -> tuple[str, ...]:
        """The modalities without a file, in the order of MODALITIES."""
        return tuple(modality for modality in MODALITIES if modality not in self.files)

    @property
    def target(self) -> str:
        """What is to be synthesised; empty where that cannot be told or the case cannot be used."""
        alone = self.missing[0] if len(self.missing) == 1 else ""
        return "" if self.problem is not None else self.chosen or alone


@dataclass(frozen=True)
class Case:
    """Three modalities of one head, and the name of the fourth; fewer, where a network can do with them.

    Args:
        name: the case's name.
        target: the modality to be synthesised.
        volumes: modality -> (X, Y, Z) float32 in the units and the voxel order of the file,
            in the order of MODALITIES.
        affine: (4, 4), voxel indices to mm.
        header: of the nearest modality, as NIfTI-1, of the volume's shape.
        warnings: what is unusual about the case, in plain words.
    """

    name: str
    target: str
    volumes: dict[str, Volume]
    affine: Affine
    header: nib.Nifti1Header
    warnings: tuple[str, ...]

    @property
    def has_orientation(self) -> bool:
        """Whether the header says how the head lies; without it the affine is a guess of nibabel's."""
        return is_oriented(self.header)

    @property
    def nearest(self) -> str:
        """The modality most like the target, of those that are there."""
        return nearest_of(self.target, self.volumes)


def nearest_of(target: str, there: Collection[str]) -> str:
    """The modality most like the target, of those that are there."""
    return MOST_SIMILAR[target] if MOST_SIMILAR[target] in there else next(iter(there))


def find_cases(data_path: Path, flat: bool = True) -> list[CaseFolder]:
    """Find the cases directly inside `data_path`, sorted by name; no file is opened.

    Each has a folder of its own or, where there are no such folders, the files lie together as
    <case>-<modality>.nii.gz. What cannot be used does not hide the others: its fault waits in `CaseFolder.problem`.
    What has nothing to do with cases is named in a warning in the log.

    Args:
        flat: whether files that lie together are taken.

    Raises:
        InputError: `data_path` is missing, not readable, or holds no case.
    """
    entries = [entry for entry in list_folder(data_path, "cases", "input ") if not entry.name.startswith(".")]
    cases = [case for entry in entries if (case := look_into(entry))]
    if flat and not any(case.files for case in cases):
        cases = flat_cases(data_path, entries) or cases
    if not cases:
        from cwdm.images.no_case import no_case_among  # here, as most folders hold cases

        raise InputError(no_case_among(data_path, entries))
    _name_the_others(entries, cases)
    return cases


def read_case(folder: CaseFolder) -> Case:
    """Read and check the modalities of a case.

    Raises:
        CaseError: other than exactly one modality is missing and none is chosen, or a file is damaged, is not one 3D
            volume of finite real numbers that is not constant, or does not share the others' voxel grid.
    """
    target = _target(folder)
    volumes: dict[str, Volume] = {}
    headers: dict[str, nib.Nifti1Header] = {}
    affines: dict[str, Affine] = {}
    for modality in (name for name in MODALITIES if name in folder.files and name != target):
        path = folder.files[modality]
        try:
            volumes[modality], headers[modality] = load(path)
            affines[modality] = affine_of(headers[modality])
            _check_content(volumes[modality])
        except FileError as error:
            raise CaseError(folder.name, f"{path.name}: {error}") from error
    nearest = nearest_of(target, volumes)
    check_same_grid(folder.name, nearest, volumes, affines)
    warnings = (*_grid_warnings(headers[nearest], affines[nearest]), *_background_warnings(volumes))
    return Case(folder.name, target, volumes, affines[nearest], headers[nearest], warnings)


def output_name(case: str, modality: str) -> str:
    """Name of the file for one volume of a case."""
    return f"{case}-{modality}.nii.gz"


def write_volume(path: Path, volume: npt.ArrayLike, like: Case, native: bool = True, made_with: str = "") -> None:
    """Write a synthesised volume as .nii.gz with the geometry of its case; same input, same bytes.

    Args:
        path: the file; appears whole or not at all.
        volume: (X, Y, Z) real numbers in the voxel order of the case.
        like: the case; the modality nearest to its target gives the header.
        native: the intensities are the scanner's: rounded to the integer type that the nearest modality
            is stored in, if it is. Otherwise, and for [0, 1], float32 is written.
        made_with: for the header, at most 48 characters.

    Raises:
        CaseError: the volume has values that are not finite.
        OutputError: the file cannot be written.
    """
    values = np.asarray(volume, np.float32)
    header = like.header.copy()
    assert values.shape == header.get_data_shape(), (values.shape, header.get_data_shape())
    if bad := values.size - np.count_nonzero(np.isfinite(values)):
        raise CaseError(like.name, f"the synthesised {like.target} has {bad} voxels that are not finite numbers")
    voxels = _to_stored_type(values, header) if native else values
    _mark_as_synthesised(header, like.target, made_with)
    write(path, voxels, header)


# Folders


def list_folder(folder: Path, holds: str, name: str = "") -> list[Path]:
    """What is in a folder, by name.

    Args:
        holds: what should be there, for the message.
        name: what the folder is called, with a space behind it, or nothing.

    Raises:
        InputError: it is missing, no folder, or cannot be read.
    """
    try:
        return sorted(folder.iterdir(), key=lambda entry: entry.name)
    except FileNotFoundError as error:
        raise InputError(f"the {name}folder {folder} does not exist; check the path") from error
    except NotADirectoryError as error:
        which = f"the {name}{folder}" if name else str(folder)
        raise InputError(f"{which} is not a folder; give the folder of {holds}") from error
    except OSError as error:
        raise InputError(f"the {name}folder {folder} cannot be read: {error.strerror}") from error


def look_into(entry: Path) -> CaseFolder | None:
    """The case in a folder, or None for what is no folder and for a folder that has nothing to do with cases."""
    try:
        paths = sorted(entry.iterdir(), key=lambda path: path.name)
    except (NotADirectoryError, FileNotFoundError):
        return None
    except OSError as error:
        if entry.name in _SYSTEM_FOLDERS or error.errno == errno.ELOOP:
            return None
        unreadable = f"the folder {entry} cannot be read ({error.strerror}); check its permissions"
        return CaseFolder(entry.name, entry, {}, unreadable)
    if any(split_name(path.name) for path in paths):
        return _case(entry.name, entry, paths)
    from cwdm.images.no_case import unrecognised  # here, as most folders are cases

    problem = unrecognised(entry, paths)
    return CaseFolder(entry.name, entry, {}, problem) if problem else None


def _case(name: str, folder: Path, paths: Iterable[Path]) -> CaseFolder:
    """The case that the files with a modality in their names make."""
    files: dict[str, Path] = {}
    problem: str | None = None
    if len(os.fsencode(name + _LONGEST_ENDING)) > LONGEST_NAME:
        problem = f"its name is too long for files named after it ({LONGEST_NAME} bytes at most); shorten it"
    patients: dict[str, Path] = {}
    for path in paths:
        if (split := split_name(path.name)) is None:
            continue
        stem, modality = split
        if stem:
            patients.setdefault(stem.casefold(), path)
        first = files.setdefault(modality, path)
        if first != path:
            problem = f"expected one file for {modality}, found {first.name} and {path.name}; remove one"
    if len(patients) > 1:
        first, second = list(patients.values())[:2]
        problem = (
            f"expected files of one patient, found {first.name} and {second.name}; let the names of one patient's "
            "files begin alike, and give each patient a folder, or a flat folder of many as the input itself"
        )
    return CaseFolder(name, folder, files, problem)


def flat_cases(folder: Path, paths: Iterable[Path]) -> list[CaseFolder]:
    """The cases whose files lie together in a folder; none if it is the folder of one case."""
    together: dict[str, list[Path]] = {}
    for path in paths:
        if (split := split_name(path.name)) and split[0]:
            together.setdefault(split[0], []).append(path)
    if len(together) < 2:
        return []
    return [replace(_case(name, folder, files), flat=True) for name, files in sorted(together.items())]


def split_name(file_name: str) -> tuple[str, str] | None:
    """What the name of an image begins with, and its modality; None for other files."""
    match = _FILE_NAME.fullmatch(file_name)
    if match is None or file_name.startswith("."):  # macOS keeps attributes in ._<name>
        return None
    ending = match[2].lower()
    return match[1] or "", _ALIASES.get(ending, ending)


def _name_the_others(entries: Iterable[Path], cases: Collection[CaseFolder]) -> None:
    """Tell of what was passed over: folders that are no cases, links to nothing, images beside folders of cases."""
    taken = {path for case in cases for path in (case.folder, *case.files.values())}
    others = [entry for entry in entries if entry not in taken]
    if folders := [entry.name for entry in others if not is_file(entry)]:
        _log.warning("passed over, no folders of a case: %s", ", ".join(folders))
    flat = {case.name for case in cases if case.flat}  # whose doubled files are their own fault
    splits = {entry.name: split_name(entry.name) for entry in others if entry.name not in folders}
    if images := [name for name, split in splits.items() if split and split[0] not in flat]:
        _log.warning("passed over, not in the folder of a case: %s", ", ".join(images))


def _target(folder: CaseFolder) -> str:
    """The one modality that is missing, or is chosen of several."""
    if folder.problem is not None:
        raise CaseError(folder.name, folder.problem)
    if folder.target:
        return folder.target
    there = ", ".join(modality for modality in MODALITIES if modality in folder.files) or "none"
    missing = ", ".join(folder.missing) or "nothing"
    advice = "take the one to be synthesised away"
    if folder.missing:
        advice = "add the others, or choose a target and take weights that were trained with so many missing"
    raise CaseError(
        folder.name,
        f"expected exactly one missing modality, found {there} with {missing} missing; {advice}",
    )


# Checking content


def _check_content(volume: Volume) -> None:
    finite = np.isfinite(volume)
    if not finite.all():
        bad = volume.size - np.count_nonzero(finite)
        raise FileError(f"{bad} voxels are NaN or infinite; replace them, with 0 outside the brain")
    low, high = float(volume.min()), float(volume.max())
    if low == high:
        raise FileError(f"every voxel is {low:g}; the image is empty, export it again")


def _grid_warnings(header: nib.Nifti1Header, affine: Affine) -> Iterable[str]:
    shape = shape_of(header)
    if sorted(shape) != sorted(_USUAL_SHAPE):
        yield f"{by(shape)} voxels instead of the {by(_USUAL_SHAPE)} of BraTS"
    edges_mm = spacing_mm(affine)
    if np.abs(edges_mm - 1).max() > 0.01:
        found = by(f"{length:.3g}" for length in edges_mm)
        yield f"voxels of {found} mm instead of the 1 mm of BraTS"
    if not is_oriented(header):
        yield "the header does not say how the head lies (no qform, no sform); taken as stored like BraTS (LPS)"


def _background_warnings(volumes: Mapping[str, Volume]) -> Iterable[str]:
    # A brain fills about a sixth of the usual volume and half of the tightest box around it.
    share = {name: np.count_nonzero(volume == 0) / volume.size for name, volume in volumes.items()}
    if full := [name for name, zeros in share.items() if zeros < 0.2]:
        yield f"{', '.join(full)}: hardly any voxel is 0; the skull should be removed and the background be 0"


# Writing


def _to_stored_type(values: Volume, header: nib.Nifti1Header) -> npt.NDArray[np.generic]:
    dtype = header.get_data_dtype()
    if dtype.kind not in "iu" or header.get_slope_inter() not in ((None, None), (1.0, 0.0)):
        return values
    # In float32 the ends of wide integer types round outwards: then the next number inside is the limit.
    low, high = np.float32(np.iinfo(dtype).min), np.float32(np.iinfo(dtype).max)
    if int(high) > np.iinfo(dtype).max:
        high = np.nextafter(high, np.float32(0))
    return np.clip(np.rint(values), low, high).astype(dtype)


def _mark_as_synthesised(header: nib.Nifti1Header, modality: str, made_with: str) -> None:
    behind = f", {made_with}" if made_with else ""
    room = _LONGEST_DESCRIPTION - len(behind)
    header["descrip"] = f"{MARK} {__version__} ({modality})"[:room] + behind
    for leftover in ("cal_min", "cal_max", "glmin", "glmax", "intent_code", "aux_file", "intent_name"):
        header[leftover] = 0 if header[leftover].dtype.kind in "iuf" else b""
