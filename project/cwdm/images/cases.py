"""BraTS case folders and the NIfTI files in them; no other module knows file names or NIfTI.

A case is a folder, and its name is the folder's. Files are recognised by their endings, as in
`BraTS-GLI-00001-000-t1n.nii.gz`, `BraTS20_Training_001_flair.nii` or plain `t2.nii.gz`.

Input files are not trusted. The header is read alone and checked first; then exactly the voxels that it
promises are read, slice by slice, so that no file can cost more memory than the largest volume allowed.
"""

import errno
import gzip
import itertools
import logging
import math
import os
import re
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, NamedTuple, cast

import nibabel as nib
import numpy as np
import numpy.typing as npt
from isal import igzip, isal_zlib
from nibabel import orientations
from nibabel.spatialimages import HeaderDataError

from cwdm import __version__
from cwdm.errors import CaseError, InputError
from cwdm.files import write_atomically

Volume = npt.NDArray[np.float32]
Affine = npt.NDArray[np.float64]

MODALITIES = ("t1n", "t1c", "t2w", "t2f")
"""In the order in which the networks take them."""

NEAREST = {"t1n": "t1c", "t1c": "t1n", "t2w": "t2f", "t2f": "t2w"}
"""The contrast that looks most like each."""

_ALIASES = {"t1": "t1n", "t1ce": "t1c", "t1gd": "t1c", "t2": "t2w", "flair": "t2f"}
_ENDINGS = "|".join((*MODALITIES, *_ALIASES))
_FILE_NAME = re.compile(rf"(?:(.*)[-_.])?({_ENDINGS})\.nii(?:\.gz)?", re.IGNORECASE | re.DOTALL)
_NAMES = f"{', '.join(MODALITIES)} or the old {', '.join(_ALIASES)}"

_SYSTEM_FOLDERS = {"lost+found", "System Volume Information", "$RECYCLE.BIN"}
"""What systems put into disks and shares, and let nobody read."""

LONGEST_NAME = 255  # bytes that file systems allow
_LONGEST_ENDING = "-t1n-spread.nii.gz"  # that a file named after a case gets
_MAX_AXIS = 1024
_MAX_VOXELS = 512**3
_MAX_OFFSET = 1 << 20  # bytes before the first voxel, extensions included; BraTS files have up to 3 KiB
_MAX_FILE = 9 * _MAX_VOXELS  # bytes; 8 a voxel, and what does not shrink hardly grows

_LONGEST_DESCRIPTION = 79  # characters, and a zero behind them

_REAL_TYPES = {2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280}  # NIfTI codes of integers and floats up to 64 bits

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
    """Three contrasts of one head, and the name of the fourth; fewer, where a network can do with them.

    Args:
        name: the case's name.
        target: the modality to be synthesised.
        volumes: modality -> (X, Y, Z) float32 in the units and the voxel order of the file,
            in the order of MODALITIES.
        affine: (4, 4), voxel indices to mm.
        header: of the nearest contrast, as NIfTI-1, of the volume's shape.
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
        return bool(self.header["qform_code"] or self.header["sform_code"])

    @property
    def nearest(self) -> str:
        """The contrast most like the target, of those that are there."""
        return nearest_of(self.target, self.volumes)


class _FileError(Exception):
    """A file cannot be used; the message says what was expected and found."""


def nearest_of(target: str, there: Collection[str]) -> str:
    """The contrast most like the target, of those that are there."""
    return NEAREST[target] if NEAREST[target] in there else next(iter(there))


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
    cases = [case for entry in entries if (case := _look_into(entry))]
    if flat and not any(case.files for case in cases):
        cases = _flat_cases(data_path, entries) or cases
    if not cases:
        raise InputError(_no_case(data_path, entries))
    _name_the_others(entries, cases)
    return cases


def case_folder(folder: Path, name: str = "") -> CaseFolder:
    """The case in one folder, whose faults wait in `CaseFolder.problem`.

    Args:
        name: of the case, where the folder may hold several, flat.

    Raises:
        InputError: the folder holds no file of any modality, or is none.
    """
    folder = folder.absolute()  # "." has no name
    case = _look_into(folder)
    if name and case is not None:
        case = next((one for one in _flat_cases(folder, list_folder(folder, "images")) if one.name == name), case)
    if case is None or not case.files:
        expected = f"expected a folder with files like <case>-t1n.nii.gz (one of {_NAMES}, .nii or .nii.gz)"
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
    if broken := [path for path in case.files.values() if not path.is_file()]:
        raise CaseError(case.name, f"{broken[0]} is no file, or a link that leads nowhere; repair it or take it away")
    if case.flat:
        segmentations = (case.folder / f"{case.name}{join}seg.nii{gz}" for join in "-_." for gz in (".gz", ""))
        paths = [*case.files.values(), *segmentations]
    else:
        paths = [path for path in list_folder(case.folder, "images") if not path.name.startswith(".")]
    return {path.name: path for path in paths if path.is_file()}


def read_case(folder: CaseFolder) -> Case:
    """Read and check the contrasts of a case.

    Raises:
        CaseError: other than exactly one modality is missing and none is chosen, or a file is damaged, is not one 3D
            volume of finite real numbers with some contrast, or does not share the others' voxel grid.
    """
    target = _target(folder)
    volumes: dict[str, Volume] = {}
    headers: dict[str, nib.Nifti1Header] = {}
    affines: dict[str, Affine] = {}
    for modality in (name for name in MODALITIES if name in folder.files and name != target):
        path = folder.files[modality]
        try:
            volumes[modality], headers[modality] = _read_volume(path)
            affines[modality] = _affine(headers[modality])
            _check_content(volumes[modality])
        except _FileError as error:
            raise CaseError(folder.name, f"{path.name}: {error}") from error
    nearest = nearest_of(target, volumes)
    check_same_grid(folder.name, nearest, volumes, affines)
    warnings = (*_grid_warnings(headers[nearest], affines[nearest]), *_background_warnings(volumes))
    return Case(folder.name, target, volumes, affines[nearest], headers[nearest], warnings)


def read_volume(path: Path) -> Volume:
    """Read one file on its own: (X, Y, Z) float32 in the voxel order of the file.

    Raises:
        InputError: it is damaged, or is not one 3D volume of real numbers.
    """
    try:
        return _read_volume(path)[0]
    except _FileError as error:
        raise InputError(f"{path}: {error}") from error


class Image(NamedTuple):
    """A volume and where its voxels lie.

    Attributes:
        volume: (X, Y, Z) float32 in the units and the voxel order of the file.
        affine: (4, 4), voxel indices to mm.
        oriented: whether the header gives the affine. Without qform and sform it is a guess of nibabel's, and the
            volume is taken as stored like BraTS.
    """

    volume: Volume
    affine: Affine
    oriented: bool


def read_grid(path: Path) -> Image:
    """Read one file of finite numbers.

    Raises:
        InputError: it is damaged, is not one 3D volume of finite real numbers, or its affine is not invertible.
    """
    try:
        volume, header = _read_volume(path)
        if not np.isfinite(volume).all():
            raise _FileError("holds NaN or infinity; replace them, with 0 outside the brain")
        return Image(volume, _affine(header), bool(header["qform_code"] or header["sform_code"]))
    except _FileError as error:
        raise InputError(f"{path}: {error}") from error


def read_description(path: Path) -> str:
    """What the header of a file says in words; empty where it says nothing or cannot be read."""
    try:
        with _open(path) as stream:
            text = bytes(_parse_header(stream)["descrip"].tobytes())
    except (_FileError, EOFError, OSError, isal_zlib.IsalError):  # type: ignore[misc]  # its stubs name an instance
        return ""
    return text.rstrip(b"\0").decode("ascii", "replace")


def in_order_of(like: Image, image: Image, case: str, names: tuple[str, str]) -> Volume:
    """The volume of `image` with its axes permuted and reversed to the voxel order of `like`; a view.

    Where one of both does not say how its voxels lie, they are taken as stored alike.

    Args:
        names: of `like` and `image`, for messages.

    Raises:
        CaseError: the voxels of the two do not lie at the same places.
    """
    volume, affine = image.volume, like.affine
    if like.oriented and image.oriented:  # else one of the affines is a guess
        # Between voxel indices, so that equal grids stay as they are however obliquely they lie.
        change = orientations.io_orientation(np.linalg.inv(like.affine) @ image.affine)
        affine = image.affine @ orientations.inv_ornt_aff(change, volume.shape)
        volume = orientations.apply_orientation(volume, change)
    first, second = names
    check_same_grid(case, first, {first: like.volume, second: volume}, {first: like.affine, second: affine})
    return volume


def output_name(case: str, modality: str) -> str:
    """Name of the file for one volume of a case."""
    return f"{case}-{modality}.nii.gz"


def write_volume(path: Path, volume: npt.ArrayLike, like: Case, native: bool = True, made_with: str = "") -> None:
    """Write a synthesised volume as .nii.gz with the geometry of its case; same input, same bytes.

    Args:
        path: the file; appears whole or not at all.
        volume: (X, Y, Z) real numbers in the voxel order of the case.
        like: the case; the contrast nearest to its target gives the header.
        native: the intensities are the scanner's: rounded to the integer type that the nearest contrast
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
    _write(path, voxels, header)


def write_nifti(
    path: Path, voxels: npt.NDArray[np.generic], affine: Affine, description: str = "", oriented: bool = True
) -> None:
    """Write a volume that belongs to no case yet as .nii.gz, in the type it has; same input, same bytes.

    Args:
        path: the file; appears whole or not at all.
        voxels: (X, Y, Z) real numbers.
        affine: (4, 4), voxel indices to mm.
        description: for the header, at most 79 characters.
        oriented: False leaves open how the voxels lie in space.

    Raises:
        OutputError: the file cannot be written.
    """
    header = nib.Nifti1Header()
    header.set_data_shape(voxels.shape)
    header.set_qform(affine, code=int(oriented))
    header.set_sform(affine, code=int(oriented))
    header.set_xyzt_units("mm")
    header["descrip"] = description
    _write(path, voxels, header)


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


def _look_into(entry: Path) -> CaseFolder | None:
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
    if any(_split(path.name) for path in paths):
        return _case(entry.name, entry, paths)
    problem = _unrecognised(entry, paths)
    return CaseFolder(entry.name, entry, {}, problem) if problem else None


def _case(name: str, folder: Path, paths: Iterable[Path]) -> CaseFolder:
    """The case that the files with a modality in their names make."""
    files: dict[str, Path] = {}
    problem: str | None = None
    if len(os.fsencode(name + _LONGEST_ENDING)) > LONGEST_NAME:
        problem = f"its name is too long for files named after it ({LONGEST_NAME} bytes at most); shorten it"
    patients: dict[str, Path] = {}
    for path in paths:
        if (split := _split(path.name)) is None:
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


def _flat_cases(folder: Path, paths: Iterable[Path]) -> list[CaseFolder]:
    """The cases whose files lie together in a folder; none if it is the folder of one case."""
    together: dict[str, list[Path]] = {}
    for path in paths:
        if (split := _split(path.name)) and split[0]:
            together.setdefault(split[0], []).append(path)
    if len(together) < 2:
        return []
    return [replace(_case(name, folder, files), flat=True) for name, files in sorted(together.items())]


def _split(file_name: str) -> tuple[str, str] | None:
    """What the name of an image begins with, and its modality; None for other files."""
    match = _FILE_NAME.fullmatch(file_name)
    if match is None or file_name.startswith("."):  # macOS keeps attributes in ._<name>
        return None
    ending = match[2].lower()
    return match[1] or "", _ALIASES.get(ending, ending)


def _unrecognised(folder: Path, paths: Iterable[Path]) -> str | None:
    """Why a folder without a file of any modality seems to be meant as a case all the same."""
    if found := [path.name for path in paths if _is_image(path.name)]:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        return (
            f"expected files like {output_name(folder.name, 't1n')} (one of {_NAMES}, .nii or .nii.gz), "
            f"found {', '.join(found[:3])}{more}; rename them"
        )
    for below, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(map(_is_image, names)):
            return f"expected its files in {folder} itself, found some in {below}; give each case one folder"
    return None


def _is_image(file_name: str) -> bool:
    return file_name.lower().endswith((".nii", ".nii.gz")) and not file_name.startswith(".")


def _name_the_others(entries: Iterable[Path], cases: Collection[CaseFolder]) -> None:
    """Tell of what was passed over: folders that are no cases, links to nothing, images beside folders of cases."""
    taken = {path for case in cases for path in (case.folder, *case.files.values())}
    others = [entry for entry in entries if entry not in taken]
    if folders := [entry.name for entry in others if not os.path.isfile(entry)]:  # noqa: PTH113  # raises nothing
        _log.warning("passed over, no folders of a case: %s", ", ".join(folders))
    flat = {case.name for case in cases if case.flat}  # whose doubled files are their own fault
    splits = {entry.name: _split(entry.name) for entry in others if entry.name not in folders}
    if images := [name for name, split in splits.items() if split and split[0] not in flat]:
        _log.warning("passed over, not in the folder of a case: %s", ", ".join(images))


def _no_case(data_path: Path, entries: Iterable[Path]) -> str:
    if any(_split(entry.name) for entry in entries):
        return (
            f"{data_path} holds the files of a case itself; give the folder above it "
            f"({data_path.resolve().parent}), where each case has a folder of its own"
        )
    there = [entry.name for entry in entries]
    found = f"; found {', '.join(there[:3])}{' and more' if len(there) > 3 else ''}" if there else ", found nothing"
    return (
        f"no case found in {data_path}; expected folders with files like "
        f"<case>/<case>-t1n.nii.gz (one of {_NAMES}, .nii or .nii.gz){found}"
    )


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


# Reading one file


def _read_volume(path: Path) -> tuple[Volume, nib.Nifti1Header]:
    try:
        if path.is_dir():
            raise _FileError("is a folder, expected a file")
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise _FileError("is not a regular file")
        # A gzip file may hold any number of empty members and zeros, through which its reader must go.
        if (size := path.stat().st_size) > _MAX_FILE:
            raise _FileError(f"expected at most {_MAX_FILE:,} bytes, found {size:,}; store the contrast as a 3D volume")
        with _open(path) as stream:
            header = _read_header(stream)
            volume = _read_voxels(stream, header)
            # Reading on to the end makes gzip compare its checksum.
            if len(stream.read(_MAX_OFFSET)) == _MAX_OFFSET:
                raise _FileError("holds far more than the volume that its header describes; write it again")
    except EOFError as error:
        raise _FileError("the compressed data end too early; copy or download the file again") from error
    except (gzip.BadGzipFile, isal_zlib.IsalError) as error:  # type: ignore[misc]  # its stubs name an instance
        raise _FileError(f"is not a sound gzip file ({error}); copy or download it again") from error
    except OSError as error:
        raise _FileError(f"cannot be read: {error.strerror}") from error
    return volume, _as_nifti1(header, volume.shape)


def _open(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        with path.open("rb") as file:
            if (start := file.read(2)) not in (b"\x1f\x8b", b""):  # of other files igzip says that they end too early
                raise _FileError(f"is not a sound gzip file (it begins with {start!r}); copy or download it again")
        # Compares checksums like the gzip module, and passes over empty members ten times as fast.
        return cast(IO[bytes], igzip.open(path, "rb"))
    return path.open("rb")


def _read_header(stream: IO[bytes]) -> nib.Nifti1Header | nib.Nifti2Header:
    """Read the header and check whatever decides how much will be read."""
    header = _parse_header(stream)
    shape = _shape(header)
    if len(shape) < 3 or any(length != 1 for length in shape[3:]):
        raise _FileError(f"expected one 3D volume, found {_by(shape)} voxels; store each contrast as a 3D volume")
    if min(shape) < 1 or max(shape) > _MAX_AXIS or math.prod(shape) > _MAX_VOXELS:
        raise _FileError(
            f"expected 1 to {_MAX_AXIS} voxels along each axis and at most {_MAX_VOXELS} in all, "
            f"found {_by(shape)}; the header is damaged, or the volume should be resampled"
        )
    if int(header["datatype"]) not in _REAL_TYPES:
        raise _FileError(
            f"expected one real number a voxel, found {header.get_value_label('datatype')}; store plain intensities"
        )
    try:
        header.get_slope_inter()
    except HeaderDataError as error:
        raise _FileError(f"the header is damaged ({error})") from error
    offset = float(header["vox_offset"])
    if not header.sizeof_hdr + 4 <= offset <= _MAX_OFFSET:
        raise _FileError(f"the header is damaged: voxels should begin within 1 MiB, found byte {offset:g}")
    stream.read(int(offset) - header.sizeof_hdr)
    return header


def _parse_header(stream: IO[bytes]) -> nib.Nifti1Header | nib.Nifti2Header:
    size = stream.read(4)
    for kind, magic in ((nib.Nifti1Header, b"n+1\0"), (nib.Nifti2Header, b"n+2\0\r\n\x1a\n")):
        for order in "<>":
            if size != struct.pack(f"{order}i", kind.sizeof_hdr):
                continue
            block = size + stream.read(kind.sizeof_hdr - 4)
            if len(block) == kind.sizeof_hdr and magic in block:
                return kind(block, endianness=order, check=False)
    raise _FileError("is not a NIfTI file (.nii) or ends within its header; convert or copy it again")


def _shape(header: nib.Nifti1Header | nib.Nifti2Header) -> tuple[int, ...]:
    rank, *lengths = (int(length) for length in header["dim"])
    if not 1 <= rank <= 7:
        raise _FileError(f"the header is damaged: expected 3 axes, found {rank}")
    return tuple(lengths[:rank])


def _read_voxels(stream: IO[bytes], header: nib.Nifti1Header | nib.Nifti2Header) -> Volume:
    """Read the volume slice by slice, so that no other copy of it is ever in memory."""
    dtype = header.get_data_dtype()
    slope, inter = header.get_slope_inter()
    shape = _shape(header)[:3]
    slice_bytes = shape[0] * shape[1] * dtype.itemsize
    volume = np.empty(shape, np.float32, order="F")
    for z in range(shape[2]):
        data = stream.read(slice_bytes)
        if len(data) < slice_bytes:
            raise _FileError(f"expected {_by(shape)} voxels, the file ends in slice {z + 1}; copy it again")
        values = np.frombuffer(data, dtype).reshape(shape[:2], order="F")
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found among the infinities
            volume[:, :, z] = values if slope is None else values * np.float64(slope) + np.float64(inter)
    return volume


def _as_nifti1(header: nib.Nifti1Header | nib.Nifti2Header, shape: tuple[int, ...]) -> nib.Nifti1Header:
    """The same header as little-endian NIfTI-1 of a 3D volume."""
    nifti1 = nib.Nifti1Header(endianness="<")
    own = {"sizeof_hdr", "magic", "vox_offset"}
    for field in set(nifti1.keys()) & set(header.keys()) - own:
        nifti1[field] = header[field]
    nifti1.set_data_shape(shape)
    for code in ("qform_code", "sform_code"):
        if nifti1[code] < 0:  # the standard counts codes above 0 alone, nibabel all but 0
            nifti1[code] = 0
    return nifti1


def _affine(header: nib.Nifti1Header) -> Affine:
    try:
        affine = np.asarray(header.get_best_affine(), np.float64)
    except (HeaderDataError, ValueError) as error:
        raise _FileError(f"the orientation in the header is damaged ({error})") from error
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    # Below 1e-3 of a box's volume the axes nearly lie in a plane.
    if not (np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-3 * lengths.prod() > 0):
        raise _FileError(f"the affine in the header is not invertible: {affine.tolist()}; repair the header")
    return affine


# Checking content


def _check_content(volume: Volume) -> None:
    finite = np.isfinite(volume)
    if not finite.all():
        bad = volume.size - np.count_nonzero(finite)
        raise _FileError(f"{bad} voxels are NaN or infinite; replace them, with 0 outside the brain")
    low, high = float(volume.min()), float(volume.max())
    if low == high:
        raise _FileError(f"every voxel is {low:g}; the image is empty, export it again")


def check_same_grid(case: str, nearest: str, volumes: Mapping[str, Volume], affines: Mapping[str, Affine]) -> None:
    """Volumes of one shape whose voxels lie at the same places; `nearest` is the one that the others are held to.

    Raises:
        CaseError: they do not.
    """
    if len({volume.shape for volume in volumes.values()}) > 1:
        found = ", ".join(f"{modality} {_by(volume.shape)}" for modality, volume in volumes.items())
        raise CaseError(case, f"expected volumes of one shape, found {found}; resample them to one grid")
    # Half a voxel: less, and every voxel still lies nearest to its partner; rounding in headers moves corners
    # by micrometres, a wrong grid by voxels.
    corners = [(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in volumes[nearest].shape))]
    tolerance_mm = 0.5 * _spacing_mm(affines[nearest]).min()
    for modality, affine in affines.items():
        shift_mm = np.linalg.norm((affine - affines[nearest]) @ np.transpose(corners), axis=0).max()
        if shift_mm > tolerance_mm:
            raise CaseError(
                case,
                f"expected volumes on one grid, found corners of {modality} and {nearest} {shift_mm:.3g} mm "
                "apart (affines differ); register or resample them to one grid",
            )


def _grid_warnings(header: nib.Nifti1Header, affine: Affine) -> Iterable[str]:
    shape = _shape(header)
    if sorted(shape) != sorted(_USUAL_SHAPE):
        yield f"{_by(shape)} voxels instead of the {_by(_USUAL_SHAPE)} that the weights were trained on"
    spacing_mm = _spacing_mm(affine)
    if np.abs(spacing_mm - 1).max() > 0.01:
        found = _by(f"{length:.3g}" for length in spacing_mm)
        yield f"voxels of {found} mm instead of the 1 mm that the weights were trained on"
    if not (header["qform_code"] or header["sform_code"]):
        yield "the header does not say how the head lies (no qform, no sform); taken as stored like BraTS (LPS)"


def _background_warnings(volumes: Mapping[str, Volume]) -> Iterable[str]:
    # A brain fills about a sixth of the usual volume and half of the tightest box around it.
    share = {name: np.count_nonzero(volume == 0) / volume.size for name, volume in volumes.items()}
    if full := [name for name, zeros in share.items() if zeros < 0.2]:
        yield f"{', '.join(full)}: hardly any voxel is 0; the skull should be removed and the background be 0"


def _spacing_mm(affine: Affine) -> npt.NDArray[np.float64]:
    return cast(npt.NDArray[np.float64], np.linalg.norm(affine[:3, :3], axis=0))


def _by(lengths: Iterable[object]) -> str:
    return "×".join(map(str, lengths))


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


def _write(path: Path, voxels: npt.NDArray[np.generic], header: nib.Nifti1Header) -> None:
    """Write voxels as they are; of the header, what says how they are stored is set here."""
    header.set_data_dtype(voxels.dtype)
    header.set_slope_inter(1, 0)
    header.set_data_offset(header.single_vox_offset)
    header["magic"] = header.single_magic
    contents = header.binaryblock + bytes(4) + voxels.tobytes(order="F")  # four zeros: no extensions

    # Neither time nor name inside, so that equal volumes make equal files.
    packed = igzip.compress(contents, 2, mtime=0)
    write_atomically(path, lambda file: file.write(packed))
