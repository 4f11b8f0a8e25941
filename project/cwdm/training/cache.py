"""Decoded volumes on disk, for training: one entry a file, known by what the file holds, cut to where it is not 0.

Training reads entries alone. The files that they came from are needed at the start of a run, which looks at each of
them once, and again only if an entry is lost or damaged.
"""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from cwdm.errors import CaseError, CwdmError, OutputError
from cwdm.files import check_writable, write_atomically, write_json
from cwdm.images import (
    ORIENTATION,
    Mask,
    Orientation,
    Window,
    block_means,
    bounding_box,
    centre,
    centred_start,
    check_same_grid,
    choose_window,
    clip_range,
    read_grid,
    tight_window,
)
from cwdm.progress import tracked
from cwdm.training.settings import DataSettings, ImageSettings

FORMAT = 2
"""The entries' format; a new number makes old entries worthless."""

INDEX = "index.json"
FORECAST_FROM = 4
"""Cases that are decoded before it is said how much room all of them will take."""

Array = npt.NDArray[Any]
Triple = tuple[int, int, int]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Subject:
    """A case on disk: the files of its images, in the order of the settings."""

    name: str
    files: tuple[Path, ...]


class Grid(NamedTuple):
    """Where the voxels of a file lie.

    Attributes:
        shape: (X, Y, Z) in the order of the file.
        affine: (4, 4), voxel indices to mm.
        oriented: whether the file says so; else it counts as stored like BraTS, as in inference.
    """

    shape: tuple[int, ...]
    affine: npt.NDArray[np.float64]
    oriented: bool

    @property
    def orientation(self) -> Orientation:
        """From the order of the file to the network's."""
        return Orientation.to(ORIENTATION, self.affine) if self.oriented else Orientation.identity()


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


# --------------------------------------------------------------------------------------------------------- decoding


def decode(subject: Subject, data: DataSettings, multiple: int = 1) -> Volumes:
    """A case, read from its files.

    Args:
        multiple: of voxels along each axis of a window around the brain.

    Raises:
        CaseError: a file cannot be used, or the files lie on different grids.
    """
    pairs = zip(subject.files, _images(data, len(subject.files)), strict=True)
    return _in_window(subject, [_decode_file(subject.name, file, image, data) for file, image in pairs], data, multiple)


def _images(data: DataSettings, files: int) -> Sequence[ImageSettings]:
    return data.images or [ImageSettings(file="")] * files


def _decode_file(case: str, file: Path, image: ImageSettings, data: DataSettings) -> DecodedFile:
    try:
        volume, affine, oriented = read_grid(file)
        grid = Grid(volume.shape, affine, oriented)
        volume = grid.orientation.apply(volume)
        if image.labels is None:
            stack: Array = volume[None]
            ranges = [list(clip_range(volume) if image.intensity == "percentiles" else image.intensity)]
        else:
            stack = (volume == np.reshape(image.labels, (-1, 1, 1, 1))).astype(np.float32)
            ranges = [[0.0, 1.0]] * len(stack)
    except CwdmError as error:
        raise CaseError(case, str(error)) from error
    except ValueError as error:
        raise CaseError(case, f"{file.name}: {error}") from error
    limits = np.asarray(ranges, np.float32).reshape(-1, 2)
    if data.downsample > 1:
        stack = _average(stack, limits, data)
    return _boxed(stack, limits, grid)


def _average(stack: Array, ranges: npt.NDArray[np.float32], data: DataSettings) -> Array:
    """Means of cubes of n³ voxels of the window in the centre, clipped first."""
    low, high = ranges.T[:, :, None, None, None]
    shifted = np.clip(stack, low, high) - low
    for axis, length in enumerate(data.window, start=1):
        assert isinstance(length, int)
        shifted = centre(shifted, axis, length)
    return block_means(shifted + low, data.downsample)


def _boxed(stack: Array, ranges: npt.NDArray[np.float32], grid: Grid) -> DecodedFile:
    (x, y, z), shape = bounding_box(np.any(stack, axis=0)), stack.shape[1:]
    box = np.ascontiguousarray(stack[:, x, y, z])
    whole = bool(np.array_equal(box, np.rint(box)) and np.abs(box).max(initial=0) < 2**15)
    start, size = (x.start, y.start, z.start), (box.shape[1], box.shape[2], box.shape[3])
    voxels = box.astype(np.int16 if whole else np.float32)
    return DecodedFile(voxels, start, size, (shape[0], shape[1], shape[2]), whole, ranges, grid)


# ------------------------------------------------------------------------------------------------------- the window


def _in_window(subject: Subject, files: Sequence[DecodedFile], data: DataSettings, multiple: int) -> Volumes:
    """Raises CaseError where the files lie on different grids, or the brain is too large for the network."""
    # Only the shapes are looked at.
    volumes = {
        str(path): np.broadcast_to(np.float32(0), f.grid.shape) for path, f in zip(subject.files, files, strict=True)
    }
    affines = {str(path): file.grid.affine for path, file in zip(subject.files, files, strict=True)}
    check_same_grid(subject.name, str(subject.files[0]), volumes, affines)
    try:
        start, shape = _window(files, data, multiple)
    except ValueError as error:
        raise CaseError(subject.name, str(error)) from error
    return Volumes(tuple(files), start, shape)


def _window(files: Sequence[DecodedFile], data: DataSettings, multiple: int) -> tuple[Triple, Triple]:
    """First voxel and size of what is kept of the volumes."""
    shape = files[0].shape
    if data.downsample > 1:  # the entries are of the window already
        return (0, 0, 0), shape
    if data.window == "brain":
        x, y, z = data.crop or (0, 0, 0)
        window: Window = tight_window(_corners(files), multiple, (x, y, z))
    elif data.layout == "brats" and data.condition_on != "nothing":
        x, y, z = data.window
        window, _ = choose_window(_corners(files), multiple, (x, y, z))
    else:
        x, y, z = data.window
        i, j, k = (centred_start(have, length) for have, length in zip(shape, data.window, strict=True))
        return (i, j, k), (x, y, z)
    return window.start, window.size


def _corners(files: Sequence[DecodedFile]) -> Mask:
    """Stands for the brain: windows look only at where it begins and ends along each axis."""
    mask = np.zeros(files[0].shape, np.bool_)
    mask[tuple(min(file.start[axis] for file in files) for axis in range(3))] = True
    mask[tuple(max(file.start[axis] + file.size[axis] for file in files) - 1 for axis in range(3))] = True
    return mask


# -------------------------------------------------------------------------------------------------------- the cache


@dataclass(frozen=True)
class CachedSubject:
    """A case that can be loaded from a cache.

    Attributes:
        digests: SHA-256 of its files.
        start, shape: the window.
        channels: of all files together.
        whole: int16 holds them.
    """

    name: str
    files: tuple[Path, ...]
    digests: tuple[str, ...]
    start: Triple
    shape: Triple
    channels: int
    whole: bool


class Cache:
    """A folder of decoded files, which runs can share: an entry's name says what it was made from, and how.

    Two names of a file, two mount points or a new time make no second entry. Volumes are kept whole, so networks with
    other targets, windows and crops read the same entries; averaged ones depend on the window too.

    Args:
        folder: made if it is not there.
        multiple: of voxels along each axis of a window around the brain.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: Path, data: DataSettings, multiple: int) -> None:
        self.folder, self.data, self.multiple = folder, data, multiple
        check_writable(folder)

    def digests(self, subjects: Sequence[Subject], shown: bool = False) -> dict[Path, str]:
        """SHA-256 of every file that can be read.

        Those whose place, size and time are as they were when last looked at are not read again.
        """
        known = _read_index(self.folder / INDEX)
        files = sorted({file for subject in subjects for file in subject.files})
        looks = _in_threads(lambda file: _look_at(file, known), files, self.threads)
        looks = tracked(looks, len(files), "looking at files", shown)
        seen = {file: found for file, found in zip(files, looks, strict=True) if found}
        entries = {os.path.realpath(file): [found.size, found.mtime_ns, found.digest] for file, found in seen.items()}
        if any(known.get(path) != entry for path, entry in entries.items()):
            # Read again: another run may have written since.
            write_json(self.folder / INDEX, {**_read_index(self.folder / INDEX), **entries})
        return {file: found.digest for file, found in seen.items()}

    @property
    def threads(self) -> int:
        """As many as may read during training."""
        return max(self.data.workers, 1)

    def prepare(self, subject: Subject, digests: Mapping[Path, str]) -> CachedSubject:
        """Decode the files that are not there yet, and lay the window.

        Raises:
            CaseError: a file cannot be used, or the files lie on different grids.
            OutputError: the cache cannot be written.
        """
        known = tuple(digests.get(file) or _digest_of(subject.name, file) for file in subject.files)
        volumes = _in_window(subject, self._files(subject.name, subject.files, known), self.data, self.multiple)
        return CachedSubject(
            subject.name, subject.files, known, volumes.start, volumes.shape, len(volumes.ranges), volumes.whole
        )

    def prepare_all(
        self, subjects: Sequence[Subject], digests: Mapping[Path, str], shown: bool = False
    ) -> list[CachedSubject | CaseError]:
        """Like `prepare`, several at a time; what is wrong with a case stands in its place."""

        def one(subject: Subject) -> CachedSubject | CaseError:
            try:
                return self.prepare(subject, digests)
            except CaseError as error:
                return error

        results = _in_threads(one, subjects, self.threads)
        return list(tracked(results, len(subjects), "decoding cases", shown))

    def forecast(
        self, subjects: Sequence[Subject], digests: Mapping[Path, str], say: Callable[[str], None]
    ) -> list[CachedSubject]:
        """Decode a few of the cases that are not there yet, and say how much room all of them will take.

        Returns:
            Those few.

        Raises:
            OutputError: there is less.
        """
        todo = [(subject, lacking) for subject in subjects if (lacking := self._lacking(subject, digests))]
        few = todo[:: max(1, len(todo) // FORECAST_FROM)][:FORECAST_FROM]
        made = self.prepare_all([subject for subject, _ in few], digests)
        ready = [case for case in made if isinstance(case, CachedSubject)]
        sizes = [path.stat().st_size for _, lacking in few for path in lacking if path.exists()]
        if not sizes:
            return ready
        files = len(set().union(*(lacking for _, lacking in todo)))
        need = sum(sizes) * files // len(sizes)
        free = shutil.disk_usage(self.folder).free + sum(sizes)
        say(
            f"decoding {files} files of {len(todo)} cases into {self.folder}: about {_gib(need)}, {_gib(free)} free "
            "there; runs with the same data.cache=FOLDER share it"
        )
        if need > free:
            raise OutputError(
                f"{self.folder} needs about {_gib(need)} for {files} decoded files, found {_gib(free)} free; free some "
                "space, or give data.cache=FOLDER on a larger disk"
            )
        return ready

    def load(self, subject: CachedSubject) -> Volumes:
        """A case that was prepared; entries that are lost or damaged are decoded again.

        Raises:
            CaseError: and their files are no longer what they were.
            OutputError: and the cache cannot be written.
        """
        files = self._files(subject.name, subject.files, subject.digests)
        return Volumes(tuple(files), subject.start, subject.shape)

    def _lacking(self, subject: Subject, digests: Mapping[Path, str]) -> set[Path]:
        """Entries of a case that are not there; of files that can be read."""
        pairs = zip(subject.files, _images(self.data, len(subject.files)), strict=True)
        entries = (self._entry(digests[file], image) for file, image in pairs if file in digests)
        return {entry for entry in entries if not entry.exists()}

    def _files(self, case: str, files: Sequence[Path], digests: Sequence[str]) -> list[DecodedFile]:
        images = _images(self.data, len(files))
        return [
            self._file(case, file, digest, image) for file, digest, image in zip(files, digests, images, strict=True)
        ]

    def _file(self, case: str, file: Path, digest: str, image: ImageSettings) -> DecodedFile:
        entry = self._entry(digest, image)
        if (found := _read_entry(entry)) is not None:
            return found
        made = _decode_file(case, file, image, self.data)
        if _digest_of(case, file) != digest:
            raise CaseError(case, f"{file} has changed since the run began; start again (with --resume)")
        _write_entry(entry, made)
        return made

    def _entry(self, digest: str, image: ImageSettings) -> Path:
        made_by: dict[str, Any] = {"labels": image.labels, "intensity": image.intensity}
        if self.data.downsample > 1:
            made_by |= {"window": self.data.window, "downsample": self.data.downsample}
        text = json.dumps([FORMAT, digest, made_by], sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"


def _write_entry(path: Path, file: DecodedFile) -> None:
    grid = {"shape": file.grid.shape, "affine": file.grid.affine.tolist(), "oriented": file.grid.oriented}
    about = {"start": file.start, "shape": file.shape, "ranges": file.ranges.tolist(), "grid": grid}
    content = safetensors.numpy.save({"voxels": file.voxels[:, :, :, :]}, {"cwdm": json.dumps(about)})
    write_atomically(path, lambda out: out.write(content))


def _read_entry(path: Path) -> DecodedFile | None:
    """A file that was decoded before; None where there is none, or one that is not whole."""
    try:
        file = safetensors.safe_open(path, framework="numpy")
        about, voxels = json.loads(file.metadata()["cwdm"]), file.get_slice("voxels")
        _, *size = voxels.get_shape()
        grid = Grid(tuple(about["grid"]["shape"]), np.asarray(about["grid"]["affine"]), about["grid"]["oriented"])
        ranges = np.asarray(about["ranges"], np.float32).reshape(-1, 2)
        whole = voxels.get_dtype() == "I16"
        return DecodedFile(voxels, tuple(about["start"]), tuple(size), tuple(about["shape"]), whole, ranges, grid)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


# --------------------------------------------------------------------------------------------------- files' digests


class _Seen(NamedTuple):
    size: int
    mtime_ns: int
    digest: str


def _look_at(file: Path, known: Mapping[str, Any]) -> _Seen | None:
    """A file's digest, from the index if nothing speaks against it; None where it cannot be read."""
    try:
        stat = file.stat()
        match known.get(os.path.realpath(file)):
            case [stat.st_size, stat.st_mtime_ns, str(digest)]:
                return _Seen(stat.st_size, stat.st_mtime_ns, digest)
        return _Seen(stat.st_size, stat.st_mtime_ns, _digest(file))
    except OSError:
        return None


def _digest(file: Path) -> str:
    if not file.is_file():  # opening a pipe would wait for ever
        raise FileNotFoundError(errno.ENOENT, "there is no such regular file")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest_of(case: str, file: Path) -> str:
    try:
        return _digest(file)
    except OSError as error:
        raise CaseError(case, f"{file} cannot be read: {error.strerror}") from error


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _in_threads(work: Callable[[T], R], items: Sequence[T], threads: int) -> Iterator[R]:
    """Results in order; what waits is dropped when one fails or the run is interrupted."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{math.ceil(size / 2**20)} MiB"
