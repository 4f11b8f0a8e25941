"""Any images of a case, such as a pair of CT and MR: found by their names, read into the network's voxel order, cut.

A file is kept as the smallest box that holds all that is not 0, in its own numbers; `Volumes` puts the files of a case
together in the window and, with `unit`, into [0, 1].
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from cwdm.arrays import Affine, Volume, block_means, bounding_box
from cwdm.errors import CaseError, CwdmError, InputError
from cwdm.files import matching
from cwdm.images.geometry import Orientation, to_lps
from cwdm.images.grids import check_same_grid, spacing_mm
from cwdm.images.image import read_grid
from cwdm.images.intensity import clip_range
from cwdm.strict import StrictSettings

Array = npt.NDArray[Any]
Triple = tuple[int, int, int]
AnyType = TypeVar("AnyType", bound=np.generic)


def _rising(values: list[float]) -> list[float]:
    if not -1e6 < values[0] < values[1] < 1e6:
        raise ValueError("must be two rising numbers within a million")
    return values


def _inside(file: str) -> str:
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError("must be a path inside the data folder")
    return file


Size = Annotated[list[Annotated[int, Field(ge=2, le=1024)]], Field(min_length=3, max_length=3)]
Range = Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(_rising)]


class ImageSettings(StrictSettings):
    """One image of a case.

    Attributes:
        file: its path inside the data folder, with `{case}` where the case's name stands.
        labels: for a label map: the values that become one channel of 0 and 1 each.
        intensity: how its numbers become [0, 1]: clipped to the 0.1 and 99.9 percentiles, to what `clip_range` makes
            of the `brain` of a skull-stripped image, or to a range such as [-1000, 1000] HU.
    """

    file: Annotated[str, AfterValidator(_inside)]
    labels: list[int] | None = None
    intensity: Literal["percentiles", "brain"] | Range = "percentiles"

    @property
    def channels(self) -> int:
        """Volumes that the network sees of it."""
        return 1 if self.labels is None else len(self.labels)


class PairSettings(BaseModel):
    """What of the settings of a training run says which images its network was trained on, and how it saw them.

    Attributes:
        layout: `files` for images described one by one.
        images: what the network makes, then what it makes it from.
        window: voxels that are kept of a volume, in its centre.
        downsample: edge in voxels of the cubes that are averaged.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    layout: Literal["brats", "files"]
    images: list[ImageSettings] | None = None
    window: Size | Literal["brain"] = Field(default=[224, 224, 160])
    downsample: int = Field(default=1, ge=1, le=8)


@dataclass(frozen=True)
class Subject:
    """A case on disk: the files of its images, in the order of the settings.

    Attributes:
        absent: places among its images of those that it does not have, rising.
    """

    name: str
    files: tuple[Path, ...]
    absent: tuple[int, ...] = ()


class Grid(NamedTuple):
    """Where the voxels of a file lie.

    Attributes:
        shape: (X, Y, Z) in the order of the file.
        affine: (4, 4), voxel indices to mm.
        oriented: whether the file says so; else it counts as stored like BraTS, as in inference.
    """

    shape: tuple[int, ...]
    affine: Affine
    oriented: bool

    @property
    def orientation(self) -> Orientation:
        """From the order of the file to the network's."""
        return to_lps(self.affine, self.oriented)

    @property
    def spacing_mm(self) -> npt.NDArray[np.float64]:
        """Edges of a voxel along the axes of the network's order."""
        return spacing_mm(self.affine)[list(self.orientation.axes)]


class Voxels(Protocol):
    """An array (C, X, Y, Z), or one on disk that is read where it is indexed."""

    def __getitem__(self, index: tuple[slice, ...], /) -> Array: ...


@dataclass(frozen=True)
class DecodedFile:
    """Channels of one file in the network's voxel order, cut to the smallest box that holds all that is not 0.

    Attributes:
        voxels: of the box, in the numbers of the file.
        start, size: the box.
        shape: of the whole volume.
        whole: all are whole numbers, stored as int16.
        ranges: what becomes 0 and 1, (C, 2).
        grid: of the file.
    """

    voxels: Voxels
    start: Triple
    size: Triple
    shape: Triple
    whole: bool
    ranges: npt.NDArray[np.float32]
    grid: Grid


@dataclass(frozen=True)
class Volumes:
    """Channels of a case in its window; beyond the volume stands what becomes 0.

    Attributes:
        files: on one grid.
        start: of the window, negative where it begins before the volume.
        shape: of the window.
    """

    files: tuple[DecodedFile, ...]
    start: Triple
    shape: Triple

    @property
    def ranges(self) -> npt.NDArray[np.float32]:
        """What becomes 0 and 1, (C, 2)."""
        return np.concatenate([file.ranges for file in self.files])

    @property
    def whole(self) -> bool:
        """Whether int16 holds all that is in the window."""
        return all(file.whole and np.all(file.ranges[:, 0] >= -(2**15)) for file in self.files)

    def raw(self, box: tuple[slice, ...] | None = None, dtype: npt.DTypeLike = np.float32) -> Array:
        """A part of all channels, (C, x, y, z), in the numbers of the files."""
        box = box or tuple(slice(0, n) for n in self.shape)
        first = [part.start + start for part, start in zip(box, self.start, strict=True)]
        out = np.empty((len(self.ranges), *(part.stop - part.start for part in box)), dtype)
        channel = 0
        for file in self.files:
            _fill(out[channel : channel + len(file.ranges)], file, first)
            channel += len(file.ranges)
        return out

    def unit(self, box: tuple[slice, ...] | None = None) -> npt.NDArray[np.float32]:
        """A part of all channels, clipped and scaled to [0, 1], (C, x, y, z)."""
        low, high = self.ranges.T[:, :, None, None, None]
        return (np.clip(self.raw(box), low, high) - low) / (high - low)


def _fill(out: Array, file: DecodedFile, first: Sequence[int]) -> None:
    """Put into `out` (C, x, y, z) what lies in the volume from the voxel `first` on."""
    # Anything at or below the range becomes 0, and whole numbers fit into integers.
    out[...] = np.floor(file.ranges[:, 0, None, None, None])
    inside, _ = _overlap(first, out.shape[1:], (0, 0, 0), file.shape)
    out[:, *inside] = 0
    there, stored = _overlap(first, out.shape[1:], file.start, file.size)
    if all(part.stop > part.start for part in stored):
        out[:, *there] = file.voxels[slice(None), *stored]


def _overlap(
    first: Sequence[int], size: Sequence[int], start: Sequence[int], length: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where two boxes overlap, counted from the start of each."""
    ends = [
        (max(a, b), max(min(a + n, b + m), max(a, b))) for a, n, b, m in zip(first, size, start, length, strict=True)
    ]
    mine = tuple(slice(low - a, high - a) for (low, high), a in zip(ends, first, strict=True))
    theirs = tuple(slice(low - b, high - b) for (low, high), b in zip(ends, start, strict=True))
    return mine, theirs


# Finding


def list_subjects(folder: Path, images: Sequence[ImageSettings]) -> list[Subject]:
    """The cases of a folder that have the first of the images, sorted by name; the others may be missing.

    Raises:
        InputError: there is none.
    """
    pattern = images[0].file
    if "{case}" not in pattern:
        raise InputError(f"'{pattern}' names one file; put {{case}} where the case's name stands")
    parts = [re.escape(part) for part in pattern.split("{case}")]
    matcher = re.compile(parts[0] + "(?P<case>[^/]+)" + parts[1] + "".join(f"(?P=case){part}" for part in parts[2:]))
    found = (path.relative_to(folder).as_posix() for path in matching(folder, pattern.replace("{case}", "*")))
    names = [match["case"] for path in found if (match := matcher.fullmatch(path))]
    if not names:
        raise InputError(f"no file like {pattern} in {folder}")
    return [Subject(name, tuple(folder / image.file.replace("{case}", name) for image in images)) for name in names]


# Decoding


def decode(subject: Subject, images: Sequence[ImageSettings], window: Sequence[int], downsample: int = 1) -> Volumes:
    """A case in the window in the centre of its volumes, read from its files.

    Raises:
        CaseError: a file cannot be used, or the files lie on different grids.
    """
    pairs = zip(subject.files, images, strict=True)
    files = [decode_file(subject.name, file, image, window, downsample) for file, image in pairs]
    return in_window(subject, files, lambda files: centred_window(files, window, downsample))


def decode_file(
    case: str, file: Path, image: ImageSettings, window: Sequence[int] = (), downsample: int = 1
) -> DecodedFile:
    """One file of a case, whole or, of cubes that are averaged, what is in the window in its centre.

    Raises:
        CaseError: it cannot be used.
    """
    try:
        volume, affine, oriented = read_grid(file)
        grid = Grid(volume.shape, affine, oriented)
        volume = grid.orientation.apply(volume)
        if image.labels is None:
            stack: Array = volume[None]
            ranges = [_range(volume, image)]
        else:
            stack = (volume == np.reshape(image.labels, (-1, 1, 1, 1))).astype(np.float32)
            ranges = [[0.0, 1.0]] * len(stack)
    except CwdmError as error:
        raise CaseError(case, str(error)) from error
    except ValueError as error:
        raise CaseError(case, f"{file.name}: {error}") from error
    limits = np.asarray(ranges, np.float32).reshape(-1, 2)
    if downsample > 1:
        stack = _average(stack, limits, window, downsample)
    return _boxed(stack, limits, grid)


def _range(volume: Volume, image: ImageSettings) -> list[float]:
    if isinstance(image.intensity, list):
        return image.intensity
    return list(clip_range(volume, "brain" if image.intensity == "brain" else "published"))


def _average(stack: Array, ranges: npt.NDArray[np.float32], window: Sequence[int], n: int) -> Array:
    """Means of cubes of n³ voxels of the window in the centre, clipped first."""
    low, high = ranges.T[:, :, None, None, None]
    shifted = np.clip(stack, low, high) - low
    for axis, length in enumerate(window, start=1):
        shifted = centre(shifted, axis, length)
    return block_means(shifted + low, n)


def _boxed(stack: Array, ranges: npt.NDArray[np.float32], grid: Grid) -> DecodedFile:
    (x, y, z), shape = bounding_box(np.any(stack, axis=0)), stack.shape[1:]
    box = np.ascontiguousarray(stack[:, x, y, z])
    whole = bool(np.array_equal(box, np.rint(box)) and np.abs(box).max(initial=0) < 2**15)
    start, size = (x.start, y.start, z.start), (box.shape[1], box.shape[2], box.shape[3])
    voxels = box.astype(np.int16 if whole else np.float32)
    return DecodedFile(voxels, start, size, (shape[0], shape[1], shape[2]), whole, ranges, grid)


# The window


def with_absent(files: Sequence[DecodedFile], absent: Sequence[int]) -> list[DecodedFile]:
    """The files of a case, with zeros on their grid in the places of those that it does not have."""
    nothing, ranges = np.zeros((1, 0, 0, 0), np.int16), np.array([[0, 1]], np.float32)
    zeros = replace(files[0], voxels=nothing, size=(0, 0, 0), whole=True, ranges=ranges)
    there = list(files)
    for place in absent:
        there.insert(place, zeros)
    return there


def in_window(
    subject: Subject,
    files: Sequence[DecodedFile],
    choose: Callable[[Sequence[DecodedFile]], tuple[Triple, Triple]],
) -> Volumes:
    """The files of a case in one window.

    Args:
        choose: first voxel and size of what is kept of the volumes; a ValueError is the case's fault.

    Raises:
        CaseError: the files lie on different grids, or `choose` finds no window.
    """
    # Only the shapes are looked at.
    volumes = {
        str(path): np.broadcast_to(np.float32(0), f.grid.shape) for path, f in zip(subject.files, files, strict=True)
    }
    affines = {str(path): file.grid.affine for path, file in zip(subject.files, files, strict=True)}
    check_same_grid(subject.name, str(subject.files[0]), volumes, affines)
    try:
        return Volumes(tuple(with_absent(files, subject.absent)), *choose(files))
    except ValueError as error:
        raise CaseError(subject.name, str(error)) from error


def centred_window(files: Sequence[DecodedFile], window: Sequence[int], downsample: int = 1) -> tuple[Triple, Triple]:
    """First voxel and size of the window in the centre; averaged files hold nothing else."""
    shape = files[0].shape
    if downsample > 1:
        return (0, 0, 0), shape
    x, y, z = window
    i, j, k = (centred_start(have, length) for have, length in zip(shape, window, strict=True))
    return (i, j, k), (x, y, z)


def centre(volume: npt.NDArray[AnyType], axis: int, length: int) -> npt.NDArray[AnyType]:
    """Crop or pad with zeros to a length, the same on both sides; what is left over goes to the end."""
    have = volume.shape[axis]
    start = centred_start(have, length)
    if have >= length:
        return volume.take(range(start, start + length), axis)
    padding = [(0, 0)] * volume.ndim
    padding[axis] = (-start, length - have + start)
    return np.pad(volume, padding)


def centred_start(have: int, length: int) -> int:
    """First of `have` voxels that `centre` keeps; negative by as many as it puts before them."""
    return (have - length) // 2 if have >= length else -((length - have) // 2)
