"""Volumes for training: found on disk, decoded once into a cache, cut into random parts that the seed decides.

Sample number n of a run depends on the seed and on n alone: on neither the number of processes nor a restart.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cwdm.brats import MODALITIES, check_same_grid, find_cases, read_grid
from cwdm.diffusion import TIMESTEPS
from cwdm.errors import CaseError, CwdmError, InputError
from cwdm.files import check_writable, write_atomically, write_json
from cwdm.preprocess import (
    ORIENTATION,
    Orientation,
    Window,
    brain_mask,
    centre,
    choose_window,
    clip_range,
    tight_window,
)
from cwdm.train_config import DataSettings, ImageSettings

FORMAT = 1
"""Of the cache; a new number makes old entries worthless."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Subject:
    """One case on disk: the files of its images, in the order of the settings."""

    name: str
    files: tuple[Path, ...]


def find_subjects(folder: Path, data: DataSettings) -> list[Subject]:
    """The cases of a data folder, sorted by name.

    Raises:
        InputError: there is none.
        CaseError: a case lacks an image.
    """
    if data.layout == "brats":
        return _find_brats(folder, data)
    subjects = list_subjects(folder, data)
    for subject in subjects:
        if lacking := [str(file) for file in subject.files if not file.is_file()]:
            raise CaseError(subject.name, f"expected {', '.join(lacking)}; there is no such file")
    return subjects


def _find_brats(folder: Path, data: DataSettings) -> list[Subject]:
    subjects = []
    for case in find_cases(folder):
        lacking = [modality for modality in modalities(data) if modality not in case.files]
        if case.problem or lacking:
            raise CaseError(case.name, case.problem or f"{', '.join(lacking)} missing; training needs them")
        subjects.append(Subject(case.name, tuple(case.files[modality] for modality in modalities(data))))
    return subjects


def modalities(data: DataSettings) -> tuple[str, ...]:
    """For the layout `brats`: what is read of a case, the target first unless it can be any."""
    if data.target is None:
        return MODALITIES
    others = tuple(modality for modality in MODALITIES if modality != data.target)
    return (data.target, *others) if data.condition_on == "others" else (data.target,)


def list_subjects(folder: Path, data: DataSettings) -> list[Subject]:
    """For the layout `files`: the cases that have the first of the images; the others may be missing.

    Raises:
        InputError: there is none.
    """
    images = data.images or []
    pattern = images[0].file
    if pattern.count("{case}") == 0:
        raise InputError(f"'{pattern}' names one file; put {{case}} where the case's name stands")
    parts = [re.escape(part) for part in pattern.split("{case}")]
    matcher = re.compile(parts[0] + "(?P<case>[^/]+)" + parts[1] + "".join(f"(?P=case){part}" for part in parts[2:]))
    found = (path.relative_to(folder).as_posix() for path in sorted(folder.glob(pattern.replace("{case}", "*"))))
    names = [match["case"] for path in found if (match := matcher.fullmatch(path))]
    if not names:
        raise InputError(f"no file like {pattern} in {folder}")
    return [Subject(name, tuple(folder / image.file.replace("{case}", name) for image in images)) for name in names]


# ------------------------------------------------------------------------------------------------------ the cache


class Cache:
    """Decoded volumes, one array a channel, in the numbers of the file; memory-mapped when they are read.

    Args:
        folder: may be shared by runs: what an entry depends on is part of its name.
    """

    def __init__(self, folder: Path, data: DataSettings, multiple: int) -> None:
        self.folder, self.data, self.multiple = folder, data, multiple
        check_writable(folder)

    def load(self, subject: Subject) -> "Volumes":
        """The decoded case, decoded now if it is not there yet.

        Raises:
            CaseError: a file cannot be used.
            OutputError: the cache cannot be written.
        """
        entry = self.folder / f"{subject.name[:80]}-{self._key(subject)}.npy"
        meta = entry.with_suffix(".json")
        if not meta.exists():
            stack, ranges, _ = decode(subject, self.data, self.multiple)
            write_atomically(entry, lambda file: np.save(file, stack))
            write_json(meta, ranges)
        ranges = json.loads(meta.read_bytes())
        return Volumes(np.load(entry, mmap_mode="r"), np.asarray(ranges, np.float32))

    def _key(self, subject: Subject) -> str:
        kept = self.data.model_dump(mode="json", include={"layout", "condition_on", "window", "downsample", "images"})
        kept["crop"] = self.data.crop if self.data.window == "brain" else None
        stats = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in subject.files]
        text = json.dumps([FORMAT, kept, self.multiple, stats], sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


@dataclass(frozen=True)
class Volumes:
    """Channels of a case.

    Attributes:
        stack: (C, X, Y, Z) in the numbers of the files.
        ranges: what becomes 0 and 1, (C, 2).
    """

    stack: Array
    ranges: npt.NDArray[np.float32]

    def unit(self, box: tuple[slice, ...] = (slice(None),) * 3) -> npt.NDArray[np.float32]:
        """Part of all channels, clipped and scaled to [0, 1], (C, x, y, z)."""
        low, high = self.ranges.T[:, :, None, None, None]
        return (np.clip(self.stack[:, *box].astype(np.float32), low, high) - low) / (high - low)


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


def decode(subject: Subject, data: DataSettings, multiple: int = 1) -> tuple[Array, list[list[float]], Grid]:
    """Channels of a case (C, X, Y, Z) in the numbers of the files, what becomes 0 and 1 in each, the first file's grid.

    Args:
        multiple: of voxels along each axis of a window around the brain.

    Raises:
        CaseError: a file cannot be used, or the files lie on different grids.
    """
    images: Sequence[ImageSettings] = data.images or [ImageSettings(file="")] * len(subject.files)
    channels: list[Array] = []
    ranges: list[list[float]] = []
    volumes, affines, grids = {}, {}, []
    try:
        for file, image in zip(subject.files, images, strict=True):
            name = str(file)
            volumes[name], affines[name], oriented = read_grid(file)
            grids.append(Grid(volumes[name].shape, affines[name], oriented))
            volume = grids[-1].orientation.apply(volumes[name])
            for label in image.labels or ():
                channels.append((volume == label).astype(np.float32))
                ranges.append([0.0, 1.0])
            if image.labels is None:
                channels.append(volume)
                ranges.append(list(clip_range(volume) if image.intensity == "percentiles" else image.intensity))
        check_same_grid(subject.name, next(iter(volumes)), volumes, affines)
        stack = _average(_cut(np.stack(channels), ranges, data, multiple), ranges, data.downsample)
    except CaseError:
        raise
    except (CwdmError, ValueError) as error:
        raise CaseError(subject.name, str(error)) from error
    whole = np.array_equal(stack, np.rint(stack)) and np.abs(stack).max() < 2**15
    return np.ascontiguousarray(stack.astype(np.int16) if whole else stack), ranges, grids[0]


def _cut(stack: Array, ranges: list[list[float]], data: DataSettings, multiple: int) -> Array:
    """The window of all channels; where it reaches beyond the volume stands what becomes 0."""
    low = np.asarray(ranges, np.float32)[:, :1, None, None]
    shifted = stack - low if low.any() else stack
    if data.window == "brain" or (data.layout == "brats" and data.condition_on != "nothing"):
        shifted = _brain_window(stack, data, multiple).crop(shifted)
    else:
        for axis, length in enumerate(data.window, start=1):
            shifted = centre(shifted, axis, length)
    return shifted + low if low.any() else shifted


def _brain_window(stack: Array, data: DataSettings, multiple: int) -> Window:
    """As in inference."""
    mask = brain_mask(stack)
    if data.window == "brain":
        x, y, z = data.crop or (0, 0, 0)
        return tight_window(mask, multiple, (x, y, z))
    x, y, z = data.window
    return choose_window(mask, multiple, (x, y, z))[0]


def _average(stack: Array, ranges: list[list[float]], n: int) -> Array:
    """Means of cubes of n³ voxels, clipped first."""
    if n == 1:
        return stack
    low, high = np.asarray(ranges, np.float32).T[:, :, None, None, None]
    x, y, z = (length // n for length in stack.shape[1:])
    means: Array = np.clip(stack, low, high).reshape(len(stack), x, n, y, n, z, n).mean((2, 4, 6))
    return means


# ---------------------------------------------------------------------------------------------------- the samples


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn; see `train_config` for the fields' meaning."""

    data: DataSettings
    seed: int
    value_range: tuple[float, float]
    timestep_power: float


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sample n of a run: target, conditions, timestep, noise.

    Returns:
        volume (1, X, Y, Z), conditions (N, X, Y, Z), noise (1, X, Y, Z), t (), target () (number of the contrast).
    """

    def __init__(self, subjects: Sequence[Subject], cache: Cache, sampling: Sampling) -> None:
        self.subjects, self.cache, self.sampling = subjects, cache, sampling

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        sampling, data = self.sampling, self.sampling.data
        rng = np.random.default_rng([sampling.seed, n])
        volumes = self.cache.load(self.subject(n))
        unit = volumes.unit(_box(rng, volumes.stack.shape[1:], data.crop))
        if data.mirror and rng.random() < 0.5:
            unit = unit[:, ::-1]
        target = int(rng.integers(len(unit))) if data.condition_on == "any" else 0
        volume = unit[target : target + 1].copy()
        conditions = self._conditions(rng, unit, target)
        low, high = sampling.value_range
        t = int(TIMESTEPS * rng.random() ** (1 / sampling.timestep_power))
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        return {
            "volume": torch.from_numpy(volume) * (high - low) + low,
            "conditions": torch.from_numpy(conditions) * (high - low) + low,
            "noise": torch.randn(volume.shape, generator=generator),
            "t": torch.tensor(t),
            "target": torch.tensor(target),
        }

    def subject(self, n: int) -> Subject:
        """Case of sample n; every epoch goes through all of them in an order of its own."""
        epoch, place = divmod(n, len(self.subjects))
        order = np.random.default_rng([self.sampling.seed, epoch, 1]).permutation(len(self.subjects))
        return self.subjects[order[place]]

    def _conditions(self, rng: np.random.Generator, unit: npt.NDArray[np.float32], target: int) -> Array:
        data = self.sampling.data
        conditions = unit.copy() if data.condition_on == "any" else unit[1:].copy()
        if data.jitter:
            gammas = np.exp(data.jitter * rng.standard_normal(len(conditions))).astype(np.float32)
            conditions **= gammas[:, None, None, None]
        if data.condition_on == "any":
            conditions[target] = 0
            others = rng.permutation([k for k in range(len(unit)) if k != target])
            conditions[others[: rng.integers(data.most_missing)]] = 0
        return conditions


def _box(rng: np.random.Generator, shape: tuple[int, ...], crop: Sequence[int] | None) -> tuple[slice, ...]:
    if crop is None:
        return tuple(slice(0, n) for n in shape)
    starts = [int(rng.integers(max(n - size, 0) + 1)) for n, size in zip(shape, crop, strict=True)]
    return tuple(slice(start, start + size) for start, size in zip(starts, crop, strict=True))
