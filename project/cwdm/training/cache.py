"""Decoded files, kept on disk once: an entry is known by what its file holds, and runs with other settings share it.

Training reads entries alone. The files that they came from are needed at the start of a run, which looks at each of
them once, and again only if an entry is lost or damaged.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import safetensors.numpy

from cwdm.errors import CaseError, OutputError
from cwdm.files import (
    check_writable,
    exists,
    open_file,
    parse_json,
    read_json,
    remove_stale,
    sha256,
    write_atomically,
    write_json,
)
from cwdm.images import DecodedFile, Grid, ImageSettings, Subject, Volumes, with_absent
from cwdm.progress import tracked
from cwdm.training.settings import DataSettings
from cwdm.training.volumes import Triple, decode_file, images_of, in_window

FORMAT = 2
"""The entries' format; a new number makes old entries worthless."""

INDEX = "index.json"
FORECAST_FROM = 4
"""Cases that are decoded before it is said how much room all of them will take."""

Look = tuple[int, int, str]
"""Size, time of the last change and digest of a file."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class CachedSubject:
    """A case that can be loaded from a cache.

    Attributes:
        digests: SHA-256 of its files.
        start, shape: the window.
        channels: of all files together.
        whole: int16 holds them.
        absent: channels of images that the case does not have.
    """

    name: str
    files: tuple[Path, ...]
    digests: tuple[str, ...]
    start: Triple
    shape: Triple
    channels: int
    whole: bool
    absent: tuple[int, ...] = ()


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
        self.threads = max(data.workers, 1)  # as many as may read during training
        check_writable(folder)
        remove_stale(folder)

    def digests(self, subjects: Sequence[Subject]) -> dict[Path, str]:
        """SHA-256 of every file that can be read."""
        return self.remember(self.looks(subjects))

    def looks(self, subjects: Sequence[Subject], shown: bool = False) -> Iterator[tuple[Path, Look | None]]:
        """Looks at every file, one after the other; None for those that cannot be read.

        Those whose place, size and time are as they were when last looked at are not read again.
        """
        known = _read_index(self.folder / INDEX)
        files = sorted({file for subject in subjects for file in subject.files})
        found = _in_threads(lambda file: (file, _look_at(file, known)), files, self.threads)
        return tracked(found, len(files), "looking at files", shown)

    def remember(self, looks: Iterable[tuple[Path, Look | None]]) -> dict[Path, str]:
        """Digest of every file that could be read; the next run need not read those again."""
        seen = {file: look for file, look in looks if look}
        entries = {os.path.realpath(file): look for file, look in seen.items()}
        index = self.folder / INDEX
        known = _read_index(index)  # now, as another run may have written since
        if any(known.get(path) != list(look) for path, look in entries.items()):
            write_json(index, {**known, **entries})
        return {file: digest for file, (_, _, digest) in seen.items()}

    def prepare(self, subject: Subject, digests: Mapping[Path, str]) -> CachedSubject:
        """Decode the files that are not there yet, and lay the window.

        Raises:
            CaseError: a file cannot be used, or the files lie on different grids.
            OutputError: the cache cannot be written.
        """
        known = tuple(digests.get(file) or _digest_of(subject.name, file) for file in subject.files)
        volumes = in_window(subject, self._files(subject.name, subject.files, known), self.data, self.multiple)
        channels, whole = len(volumes.ranges), volumes.whole
        return CachedSubject(
            subject.name, subject.files, known, volumes.start, volumes.shape, channels, whole, subject.absent
        )

    def prepare_all(
        self, subjects: Sequence[Subject], digests: Mapping[Path, str], shown: bool = False
    ) -> Iterator[CachedSubject | CaseError]:
        """Like `prepare`, several at a time as they are taken; what is wrong with a case stands in its place."""

        def one(subject: Subject) -> CachedSubject | CaseError:
            try:
                return self.prepare(subject, digests)
            except CaseError as error:
                return error

        results = _in_threads(one, subjects, self.threads)
        return tracked(results, len(subjects), "decoding cases", shown)

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
        sizes = [path.stat().st_size for _, lacking in few for path in lacking if exists(path)]
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
        files = with_absent(self._files(subject.name, subject.files, subject.digests), subject.absent)
        return Volumes(tuple(files), subject.start, subject.shape)

    def _lacking(self, subject: Subject, digests: Mapping[Path, str]) -> set[Path]:
        """Entries of a case that are not there; of files that can be read."""
        pairs = zip(subject.files, images_of(self.data, len(subject.files)), strict=True)
        entries = (self._entry(digests[file], image) for file, image in pairs if file in digests)
        return {entry for entry in entries if not exists(entry)}

    def _files(self, case: str, files: Sequence[Path], digests: Sequence[str]) -> list[DecodedFile]:
        images = images_of(self.data, len(files))
        return [self._file(case, *one) for one in zip(files, digests, images, strict=True)]

    def _file(self, case: str, file: Path, digest: str, image: ImageSettings) -> DecodedFile:
        entry = self._entry(digest, image)
        if (found := _read_entry(entry)) is not None:
            return found
        made = decode_file(case, file, image, self.data)
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
        open_file(path).close()  # a pipe would make the library wait for ever
        file = safetensors.safe_open(path, framework="numpy")
        about, voxels = parse_json(file.metadata()["cwdm"]), file.get_slice("voxels")
        _, *size = voxels.get_shape()
        grid = Grid(tuple(about["grid"]["shape"]), np.asarray(about["grid"]["affine"]), about["grid"]["oriented"])
        ranges = np.asarray(about["ranges"], np.float32).reshape(-1, 2)
        whole = voxels.get_dtype() == "I16"
        return DecodedFile(voxels, tuple(about["start"]), tuple(size), tuple(about["shape"]), whole, ranges, grid)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def _look_at(file: Path, known: Mapping[str, Any]) -> Look | None:
    """Size, time and digest of a file, this from the index if nothing speaks against it; None if it cannot be read."""
    try:
        stat = file.stat()
        match known.get(os.path.realpath(file)):
            case [stat.st_size, stat.st_mtime_ns, str(digest)]:
                return stat.st_size, stat.st_mtime_ns, digest
        return stat.st_size, stat.st_mtime_ns, sha256(file)
    except OSError:
        return None


def _digest_of(case: str, file: Path) -> str:
    try:
        return sha256(file)
    except OSError as error:
        raise CaseError(case, f"{file} cannot be read: {error.strerror}") from error


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = read_json(path)
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
