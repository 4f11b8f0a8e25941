"""NIfTI files: read within bounds and checked; written whole, with the same bytes for the same voxels.

Input files are not trusted. The header is read alone and checked first; then exactly the voxels that it
promises are read, slice by slice, so that no file can cost more memory than the largest volume allowed.
"""

import gzip
import math
import stat
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TypeAlias, cast

import nibabel as nib
import numpy as np
import numpy.typing as npt
from isal import igzip, isal_zlib
from nibabel.spatialimages import HeaderDataError

from cwdm.arrays import Affine, Volume
from cwdm.errors import InputError
from cwdm.files import exists, is_file, is_folder, open_file, write_atomically

Header: TypeAlias = nib.Nifti1Header | nib.Nifti2Header

_MAX_AXIS = 1024
_MAX_VOXELS = 512**3
_MAX_OFFSET = 1 << 20  # bytes before the first voxel, extensions included; BraTS files have up to 3 KiB
_MAX_FILE = 9 * _MAX_VOXELS  # bytes; 8 a voxel, and what does not shrink hardly grows

_REAL_TYPES = {2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280}  # NIfTI codes of integers and floats up to 64 bits


class FileError(Exception):
    """A file cannot be used; the message says what was expected and found."""


def read_description(path: Path) -> str:
    """What the header of a file says in words; empty where it says nothing or cannot be read."""
    try:
        with open_nifti(path) as stream:
            text = bytes(parse_header(stream)["descrip"].tobytes())
    except (FileError, EOFError, OSError, isal_zlib.IsalError):  # type: ignore[misc]  # its stubs name an instance
        return ""
    return text.rstrip(b"\0").decode("ascii", "replace")


def is_made(path: Path, mark: str) -> bool:
    """Whether a file of ours is there already, so that it need not be made again; one with nothing in it is not.

    Args:
        mark: how its header's description begins.

    Raises:
        InputError: something else has the name.
    """
    try:
        status = path.stat()
    except OSError:  # whatever it is but that there is none, whoever writes there will meet it too
        return False
    regular = stat.S_ISREG(status.st_mode)
    if regular and not status.st_size:
        return False
    if regular and read_description(path).startswith(mark):
        return True
    raise InputError(f"{path} is there and was not made by cwdm; move it away or choose another output folder")


def write(path: Path, voxels: npt.NDArray[np.generic], header: nib.Nifti1Header) -> None:
    """Write voxels in the type they have; the header's fields about storage are set here."""
    header.set_data_dtype(voxels.dtype)
    header.set_slope_inter(1, 0)
    header.set_data_offset(header.single_vox_offset)
    header["magic"] = header.single_magic
    contents = header.binaryblock + bytes(4) + voxels.tobytes(order="F")  # four zeros: no extensions

    # Neither time nor name inside, so that equal volumes make equal files.
    packed = igzip.compress(contents, 2, mtime=0)
    write_atomically(path, lambda file: file.write(packed))


# Reading


def load(path: Path) -> tuple[Volume, nib.Nifti1Header]:
    """A volume in the voxel order of its file, and the header as NIfTI-1; raises FileError."""
    try:
        if is_folder(path):
            raise FileError("is a folder, expected a file")
        if exists(path) and not is_file(path):  # opening a pipe would wait for ever
            raise FileError("is not a regular file")
        # A gzip file may hold any number of empty members and zeros, through which its reader must go.
        if (size := path.stat().st_size) > _MAX_FILE:
            raise FileError(f"expected at most {_MAX_FILE:,} bytes, found {size:,}; store the modality as a 3D volume")
        with open_nifti(path) as stream:
            header = _read_header(stream)
            volume = _read_voxels(stream, header)
            # Reading on to the end makes gzip compare its checksum.
            if len(stream.read(_MAX_OFFSET)) == _MAX_OFFSET:
                raise FileError("holds far more than the volume that its header describes; write it again")
    except EOFError as error:
        raise FileError("the compressed data end too early; copy or download the file again") from error
    except (gzip.BadGzipFile, isal_zlib.IsalError) as error:  # type: ignore[misc]  # its stubs name an instance
        raise FileError(f"is not a sound gzip file ({error}); copy or download it again") from error
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}") from error
    return volume, _as_nifti1(header, volume.shape)


def open_nifti(path: Path) -> IO[bytes]:
    """A file's contents, unpacked if its name says that they are packed; raises FileError, OSError."""
    if path.name.lower().endswith(".gz"):
        with open_file(path) as file:
            if (start := file.read(2)) not in (b"\x1f\x8b", b""):  # of other files igzip says that they end too early
                raise FileError(f"is not a sound gzip file (it begins with {start!r}); copy or download it again")
        # Compares checksums like the gzip module, and passes over empty members ten times as fast.
        return cast(IO[bytes], igzip.open(path, "rb"))
    return open_file(path)


def _read_header(stream: IO[bytes]) -> Header:
    """Read the header and check whatever decides how much will be read."""
    header = parse_header(stream)
    shape = shape_of(header)
    if len(shape) < 3 or any(length != 1 for length in shape[3:]):
        raise FileError(f"expected one 3D volume, found {by(shape)} voxels; store each modality as a 3D volume")
    if min(shape) < 1 or max(shape) > _MAX_AXIS or math.prod(shape) > _MAX_VOXELS:
        raise FileError(
            f"expected 1 to {_MAX_AXIS} voxels along each axis and at most {_MAX_VOXELS} in all, "
            f"found {by(shape)}; the header is damaged, or the volume should be resampled"
        )
    if int(header["datatype"]) not in _REAL_TYPES:
        raise FileError(
            f"expected one real number a voxel, found {header.get_value_label('datatype')}; store plain intensities"
        )
    try:
        header.get_slope_inter()
    except HeaderDataError as error:
        raise FileError(f"the header is damaged ({error})") from error
    offset = float(header["vox_offset"])
    if not header.sizeof_hdr + 4 <= offset <= _MAX_OFFSET:
        raise FileError(f"the header is damaged: voxels should begin within 1 MiB, found byte {offset:g}")
    stream.read(int(offset) - header.sizeof_hdr)
    return header


def parse_header(stream: IO[bytes]) -> Header:
    """The header at the beginning, unchecked; raises FileError, EOFError, OSError, IsalError."""
    size = stream.read(4)
    for kind, magic in ((nib.Nifti1Header, b"n+1\0"), (nib.Nifti2Header, b"n+2\0\r\n\x1a\n")):
        for order in "<>":
            if size != struct.pack(f"{order}i", kind.sizeof_hdr):
                continue
            block = size + stream.read(kind.sizeof_hdr - 4)
            if len(block) == kind.sizeof_hdr and magic in block:
                return kind(block, endianness=order, check=False)
    raise FileError("is not a NIfTI file (.nii) or ends within its header; convert or copy it again")


def shape_of(header: Header) -> tuple[int, ...]:
    """Voxels along each axis; raises FileError."""
    rank, *lengths = (int(length) for length in header["dim"])
    if not 1 <= rank <= 7:
        raise FileError(f"the header is damaged: expected 3 axes, found {rank}")
    return tuple(lengths[:rank])


def _read_voxels(stream: IO[bytes], header: Header) -> Volume:
    """Read the volume slice by slice, so that no other copy of it is ever in memory."""
    dtype = header.get_data_dtype()
    slope, inter = header.get_slope_inter()
    shape = shape_of(header)[:3]
    slice_bytes = shape[0] * shape[1] * dtype.itemsize
    volume = np.empty(shape, np.float32, order="F")
    for z in range(shape[2]):
        data = stream.read(slice_bytes)
        if len(data) < slice_bytes:
            raise FileError(f"expected {by(shape)} voxels, the file ends in slice {z + 1}; copy it again")
        values = np.frombuffer(data, dtype).reshape(shape[:2], order="F")
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found among the infinities
            volume[:, :, z] = values if slope is None else values * np.float64(slope) + np.float64(inter)
    return volume


def _as_nifti1(header: Header, shape: tuple[int, ...]) -> nib.Nifti1Header:
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


def is_oriented(header: nib.Nifti1Header) -> bool:
    """Whether the header says how the head lies; without it the affine is a guess of nibabel's."""
    return bool(header["qform_code"] or header["sform_code"])


def affine_of(header: nib.Nifti1Header) -> Affine:
    """Voxel indices to mm; raises FileError where the header gives no invertible affine."""
    try:
        affine = np.asarray(header.get_best_affine(), np.float64)
    except (HeaderDataError, ValueError) as error:
        raise FileError(f"the orientation in the header is damaged ({error})") from error
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    # Below 1e-3 of a box's volume the axes nearly lie in a plane.
    if not (np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-3 * lengths.prod() > 0):
        raise FileError(f"the affine in the header is not invertible: {affine.tolist()}; repair the header")
    return affine


def by(lengths: Iterable[object]) -> str:
    """Lengths along axes, as messages write them."""
    return "×".join(map(str, lengths))
