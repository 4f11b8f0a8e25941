"""What a sample is: number n of a run, as the files have it, and what the network is given of it.

It depends on the settings, the cases and n alone: on neither the number of processes nor a restart.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cwdm.diffusion import TIMESTEPS
from cwdm.images import BRAIN_LEVEL, Volumes
from cwdm.training.augment import MARGIN, augment
from cwdm.training.cache import Cache, CachedSubject
from cwdm.training.settings import TrainingSettings


class Samples(Dataset[dict[str, Tensor]]):
    """Sample n of a run, as the files have it; `assemble` makes of it what the network is given.

    Returns:
        voxels (C, X, Y, Z), the target first unless it can be any, in the numbers of the files: int16 where that
        holds every case and nothing is augmented; ranges (C, 2), what becomes 0 and 1; target (), its channel; of the
        conditions gammas (N,) and shown (N,); t (); seed () of the noise, and noise (1, X, Y, Z) itself unless it is
        drawn on the device or the objective has none.
    """

    def __init__(self, subjects: Sequence[CachedSubject], cache: Cache, settings: TrainingSettings) -> None:
        self.subjects, self.cache, self.settings = subjects, cache, settings
        self.places = [i for i, subject in enumerate(subjects) for _ in range(_times(subject.name, settings))]
        whole = not settings.data.augment.happens and all(subject.whole for subject in subjects)
        self.dtype = np.int16 if whole else np.float32

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        settings, data = self.settings, self.settings.data
        rng = np.random.default_rng([settings.seed, n])
        subject = self.subject(n)
        volumes = self.cache.load(subject)
        channels, box = len(volumes.ranges), _box(rng, volumes.shape, data.crop)
        mirrored = data.mirror and rng.random() < 0.5
        there = [channel for channel in range(channels) if channel not in subject.absent]
        target = there[rng.integers(len(there))] if data.condition_on == "any" else 0
        gammas, shown = self._conditions(rng, channels, target, there)
        voxels = self._voxels(n, volumes, box, shown)
        if mirrored:
            voxels = np.ascontiguousarray(voxels[:, ::-1])
        t = TIMESTEPS * rng.random() ** (1 / settings.loss.timestep_power)
        seed = int(rng.integers(2**63))
        sample = {
            "voxels": torch.from_numpy(voxels),
            "ranges": torch.from_numpy(volumes.ranges),
            "gammas": torch.from_numpy(gammas),
            "shown": torch.from_numpy(shown),
            "target": torch.tensor(target),
            "t": torch.tensor(t, dtype=torch.float32 if settings.loss.objective == "flow" else torch.int64),
            "seed": torch.tensor(seed),
        }
        if settings.noise == "cpu" and settings.loss.objective != "one-pass":
            sample["noise"] = draw_noise(seed, voxels.shape[1:], torch.device("cpu"))
        return sample

    def subject(self, n: int) -> CachedSubject:
        """Case of sample n; every epoch goes through all of them in an order of its own."""
        epoch, place = divmod(n, len(self.places))
        order = np.random.default_rng([self.settings.seed, epoch, 1]).permutation(len(self.places))
        return self.subjects[self.places[order[place]]]

    def _conditions(
        self, rng: np.random.Generator, channels: int, target: int, there: Sequence[int]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Gamma of each condition, and whether the network sees it."""
        data = self.settings.data
        conditions = channels if data.condition_on == "any" else channels - 1
        gammas, shown = np.ones(conditions, np.float32), np.ones(conditions, np.bool_)
        if data.jitter:
            gammas = np.exp(data.jitter * rng.standard_normal(conditions)).astype(np.float32)
        if data.condition_on == "any":
            others = rng.permutation([k for k in there if k != target])
            given = others[min(int(rng.integers(data.most_missing)), len(others) - 1) :]
            shown[:] = np.isin(np.arange(channels), given)
        return gammas, shown

    def _voxels(
        self, n: int, volumes: Volumes, box: tuple[slice, ...], shown: npt.NDArray[np.bool_]
    ) -> npt.NDArray[Any]:
        """A part of a case, in which what is shown was made worse if the settings ask for that."""
        data = self.settings.data
        if not data.augment.happens:
            return volumes.raw(box, self.dtype)
        rng = np.random.default_rng([self.settings.seed, n, 2])  # not that of sample n, which stays what it was
        given = np.r_[[False] * (len(volumes.ranges) - len(shown)), shown]
        wider = tuple(slice(part.start - MARGIN, part.stop + MARGIN) for part in box)
        spacing_mm = data.downsample * volumes.files[0].grid.spacing_mm
        # Whatever a scanner does to the rest, the network sees images scaled by this intensity of theirs.
        level = BRAIN_LEVEL if data.intensities == "brain" else 1
        reference = volumes.ranges[:, 1] * np.float32(level)
        return augment(volumes.raw(wider), given, reference, spacing_mm, data.augment, rng)

    def bytes_of(self, subject: CachedSubject) -> int:
        """Memory of a sample of a case."""
        voxels = int(np.prod(self.settings.data.crop or subject.shape))
        noise = torch.float32.itemsize if self.settings.noise == "cpu" else 0
        return voxels * (subject.channels * np.dtype(self.dtype).itemsize + noise)


def _times(name: str, settings: TrainingSettings) -> int:
    """How many times a case comes in an epoch."""
    return [1, *(times for pattern, times in settings.data.repeat.items() if fnmatchcase(name, pattern))][-1]


def _box(rng: np.random.Generator, shape: tuple[int, ...], crop: Sequence[int] | None) -> tuple[slice, ...]:
    if crop is None:
        return tuple(slice(0, n) for n in shape)
    starts = [int(rng.integers(max(n - size, 0) + 1)) for n, size in zip(shape, crop, strict=True)]
    return tuple(slice(start, start + size) for start, size in zip(starts, crop, strict=True))


def draw_noise(seed: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Noise (1, X, Y, Z); a seed means other numbers on another kind of device."""
    return torch.randn((1, *shape), generator=torch.Generator(device).manual_seed(seed), device=device)


def assemble(batch: Mapping[str, Tensor], settings: TrainingSettings, device: torch.device) -> dict[str, Tensor]:
    """What the network is given, made on the device from what `Samples` read, so that little has to move there.

    Args:
        batch: of samples, collated.

    Returns:
        volume (B, 1, X, Y, Z) and conditions (B, N, X, Y, Z) in the range of values, given (B, N), which of these there
        are, target (B,), t (B,) and, for an objective with noise, noise (B, 1, X, Y, Z).
    """
    data, record, seeds = settings.data, settings.to_record(), batch["seed"].tolist()
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    low, high = batch["ranges"][..., None, None, None].unbind(2)
    unit = batch["voxels"].to(torch.float32, copy=True).clamp_(low, high).sub_(low).div_(high - low)
    volume, conditions = unit[:, :1], unit[:, 1:]
    if data.condition_on == "any":
        volume, conditions = unit[torch.arange(len(unit), device=device), batch["target"]][:, None], unit
    if data.jitter:
        conditions = conditions ** batch["gammas"][..., None, None, None]
    conditions = conditions.masked_fill(~batch["shown"][..., None, None, None], 0)
    made = {
        "volume": record.to_range(volume),
        "conditions": record.to_range(conditions),
        "given": batch["shown"],
        "t": batch["t"],
        "target": batch["target"],
    }
    if not record.one_pass:
        noise = batch.get("noise")
        if noise is None:
            noise = torch.stack([draw_noise(seed, unit.shape[2:], device) for seed in seeds])
        made["noise"] = noise
    return made
