"""Cases for training: found on disk, decoded once into a cache, cut into random parts that the seed decides.

Sample number n of a run depends on the seed and on n alone: on neither the number of processes nor a restart.
"""

import atexit
import multiprocessing
import re
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from cwdm.diffusion import TIMESTEPS
from cwdm.errors import CaseError, CwdmError, InputError, SettingsError
from cwdm.images import MODALITIES, Subject, find_cases, list_subjects
from cwdm.training.settings import DataSettings
from cwdm.training.volume_cache import Cache, CachedSubject

SHARED_MEMORY = Path("/dev/shm")  # where processes that read put what they have read
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that stop a run; Slurm sends SIGUSR1 before a job's time is up, where `--signal=USR1@120` asks for it."""
READ_AHEAD = 2
"""Batches for each process that reads."""

Array = npt.NDArray[Any]


class ReadingError(CwdmError):
    """The processes that read cannot go on."""


class Found(NamedTuple):
    """What lies in a data folder.

    Attributes:
        subjects: complete cases, sorted by name.
        faults: of the other cases.
    """

    subjects: list[Subject]
    faults: list[CaseError]


def find_subjects(folder: Path, data: DataSettings) -> Found:
    """The cases of a data folder; raises InputError if there is none."""
    if data.layout == "brats":
        return _find_brats(folder, data)
    found = Found([], [])
    for subject in list_subjects(folder, data.images or []):
        if lacking := [str(file) for file in subject.files if not file.is_file()]:
            found.faults.append(CaseError(subject.name, f"expected {', '.join(lacking)}; there is no such file"))
        else:
            found.subjects.append(subject)
    return found


def _find_brats(folder: Path, data: DataSettings) -> Found:
    found = Found([], [])
    for case in find_cases(folder):
        lacking = [modality for modality in modalities(data) if modality not in case.files]
        if case.problem or lacking:
            reason = case.problem or f"{', '.join(lacking)} missing; training needs them"
            found.faults.append(CaseError(case.name, reason))
        else:
            found.subjects.append(Subject(case.name, tuple(case.files[modality] for modality in modalities(data))))
    return found


def leave_out(faults: Sequence[CaseError], cases: int, data: DataSettings, say: Callable[[str], None]) -> None:
    """Say which cases cannot be used.

    Args:
        cases: how many there are in all.

    Raises:
        InputError: and the settings do not allow to go on without them.
    """
    if not faults:
        return
    lines = [_printable(f"{fault.case}: {fault.reason}") for fault in faults]
    if not data.skip_bad or len(faults) == cases:
        found = "\n".join(lines)
        raise InputError(
            f"{len(faults)} of {cases} cases cannot be used:\n{found}\n"
            "mend them, or go on without them: data.skip_bad=true"
        )
    for line in lines:
        say(f"left out: {line}")


def _printable(line: str) -> str:
    """Names of files may hold anything, even sequences that would take over the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def modalities(data: DataSettings) -> tuple[str, ...]:
    """For the layout `brats`: what is read of a case, the target first unless it can be any."""
    if data.target is None:
        return MODALITIES
    others = tuple(modality for modality in MODALITIES if modality != data.target)
    return (data.target, *others) if data.condition_on == "others" else (data.target,)


# ---------------------------------------------------------------------------------------------------- the samples


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn; see `train_config` for the fields' meaning."""

    data: DataSettings
    seed: int
    value_range: tuple[float, float]
    timestep_power: float
    noise: Literal["cpu", "device"] = "cpu"


class Samples(Dataset[dict[str, Tensor]]):
    """Sample n of a run, as the files have it; `assemble` makes of it what the network takes.

    Returns:
        voxels (C, X, Y, Z), the target first unless it can be any, in the numbers of the files: int16 where that
        holds every case; ranges (C, 2), what becomes 0 and 1; target (), its channel; of the conditions gammas (N,)
        and shown (N,); t (); seed () of the noise, and noise (1, X, Y, Z) itself unless it is drawn on the device.
    """

    def __init__(self, subjects: Sequence[CachedSubject], cache: Cache, sampling: Sampling) -> None:
        self.subjects, self.cache, self.sampling = subjects, cache, sampling
        self.dtype = np.int16 if all(subject.whole for subject in subjects) else np.float32

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        sampling, data = self.sampling, self.sampling.data
        rng = np.random.default_rng([sampling.seed, n])
        volumes = self.cache.load(self.subject(n))
        voxels = volumes.raw(_box(rng, volumes.shape, data.crop), self.dtype)
        if data.mirror and rng.random() < 0.5:
            voxels = np.ascontiguousarray(voxels[:, ::-1])
        target = int(rng.integers(len(voxels))) if data.condition_on == "any" else 0
        gammas, shown = self._conditions(rng, len(voxels), target)
        t = int(TIMESTEPS * rng.random() ** (1 / sampling.timestep_power))
        seed = int(rng.integers(2**63))
        sample = {
            "voxels": torch.from_numpy(voxels),
            "ranges": torch.from_numpy(volumes.ranges),
            "gammas": torch.from_numpy(gammas),
            "shown": torch.from_numpy(shown),
            "target": torch.tensor(target),
            "t": torch.tensor(t),
            "seed": torch.tensor(seed),
        }
        if sampling.noise == "cpu":
            sample["noise"] = draw_noise(seed, voxels.shape[1:], torch.device("cpu"))
        return sample

    def subject(self, n: int) -> CachedSubject:
        """Case of sample n; every epoch goes through all of them in an order of its own."""
        epoch, place = divmod(n, len(self.subjects))
        order = np.random.default_rng([self.sampling.seed, epoch, 1]).permutation(len(self.subjects))
        return self.subjects[order[place]]

    def _conditions(self, rng: np.random.Generator, channels: int, target: int) -> tuple[Array, Array]:
        """Gamma of each condition, and whether the network sees it."""
        data = self.sampling.data
        conditions = channels if data.condition_on == "any" else channels - 1
        gammas, shown = np.ones(conditions, np.float32), np.ones(conditions, np.bool_)
        if data.jitter:
            gammas = np.exp(data.jitter * rng.standard_normal(conditions)).astype(np.float32)
        if data.condition_on == "any":
            others = rng.permutation([k for k in range(channels) if k != target])
            shown[[target, *others[: rng.integers(data.most_missing)]]] = False
        return gammas, shown

    def sample_bytes(self, subject: CachedSubject) -> int:
        """Memory of a sample of a case."""
        voxels = int(np.prod(self.sampling.data.crop or subject.shape))
        noise = torch.float32.itemsize if self.sampling.noise == "cpu" else 0
        return voxels * (subject.channels * np.dtype(self.dtype).itemsize + noise)


def _box(rng: np.random.Generator, shape: tuple[int, ...], crop: Sequence[int] | None) -> tuple[slice, ...]:
    if crop is None:
        return tuple(slice(0, n) for n in shape)
    starts = [int(rng.integers(max(n - size, 0) + 1)) for n, size in zip(shape, crop, strict=True)]
    return tuple(slice(start, start + size) for start, size in zip(starts, crop, strict=True))


def draw_noise(seed: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Noise (1, X, Y, Z); a seed means other numbers on another kind of device."""
    return torch.randn((1, *shape), generator=torch.Generator(device).manual_seed(seed), device=device)


def assemble(batch: Mapping[str, Tensor], sampling: Sampling, device: torch.device) -> dict[str, Tensor]:
    """What the network takes, made on the device from what `Samples` read, so that little has to move there.

    Args:
        batch: of samples, collated.

    Returns:
        volume (B, 1, X, Y, Z) and conditions (B, N, X, Y, Z) in the range of values, noise (B, 1, X, Y, Z), t (B,)
        and target (B,).
    """
    seeds = batch["seed"].tolist()
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    low, high = batch["ranges"][..., None, None, None].unbind(2)
    unit = batch["voxels"].to(torch.float32, copy=True).clamp_(low, high).sub_(low).div_(high - low)
    if sampling.data.condition_on == "any":
        volume = unit[torch.arange(len(unit), device=device), batch["target"]][:, None]
        conditions = unit
    else:
        volume, conditions = unit[:, :1], unit[:, 1:]
    if sampling.data.jitter:
        conditions = conditions ** batch["gammas"][..., None, None, None]
    conditions = conditions.masked_fill(~batch["shown"][..., None, None, None], 0)
    noise = batch.get("noise")
    if noise is None:
        noise = torch.stack([draw_noise(seed, unit.shape[2:], device) for seed in seeds])
    first, last = sampling.value_range
    return {
        "volume": volume * (last - first) + first,
        "conditions": conditions * (last - first) + first,
        "noise": noise,
        "t": batch["t"],
        "target": batch["target"],
    }


# ---------------------------------------------------------------------------------------------------- the batches


class SampleNumbers(Sampler[int]):
    """Numbers of the samples of one process, step after step; counted, not listed, as a run has millions.

    Args:
        steps: that are left.
        batch_size: samples of a step in all processes.
        first, share: this process's part of a step.
    """

    def __init__(self, steps: range, batch_size: int, first: int, share: int) -> None:
        self.steps, self.batch_size, self.first, self.share = steps, batch_size, first, share

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            start = step * self.batch_size + self.first
            yield from range(start, start + self.share)


class _Sound(Dataset[Any]):
    """Samples, or the error that a person should read: torch would turn it into a traceback on its way here."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, n: int) -> dict[str, Tensor] | CwdmError:
        try:
            return self.samples[n]
        except CwdmError as error:
            return error


def _collate(samples: list[Any]) -> Any:
    fault = next((sample for sample in samples if isinstance(sample, CwdmError)), None)
    return fault or default_collate(samples)


def read_batches(
    samples: Samples, numbers: Iterable[int], batch_size: int, pinned: bool
) -> Iterator[dict[str, Tensor]]:
    """Batches of samples, read ahead by `data.workers` processes.

    Raises:
        CaseError, OutputError: see `Cache.load`.
        ReadingError: a process died, or there is too little memory.
    """
    workers, handler = samples.sampling.data.workers, signal.getsignal(signal.SIGCHLD)
    loader = DataLoader(
        _Sound(samples),
        batch_size=batch_size,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=READ_AHEAD if workers else None,
        pin_memory=pinned,
        collate_fn=_collate,
        worker_init_fn=_ignore_interrupts,
    )
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    readers = set(multiprocessing.active_children()) - others
    # torch would raise wherever the loop is when a reader dies, be it in the middle of the optimiser's step.
    signal.signal(signal.SIGCHLD, handler)
    # Python ends daemons with the SIGTERM that they ignore, and would wait for them for ever.
    stop = partial(_kill, readers)
    atexit.register(stop)
    try:
        while (batch := _next(batches, readers)) is not None:
            yield batch
    finally:
        stop()
        atexit.unregister(stop)


def _next(batches: Iterator[Any], readers: Iterable[BaseProcess]) -> dict[str, Tensor] | None:
    try:
        batch = next(batches, None)
    except (RuntimeError, MemoryError, OSError, EOFError) as error:
        raise _explained(error, readers) from error
    if isinstance(batch, CwdmError):
        raise batch
    return batch


def _kill(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        process.kill()


_TROUBLE = re.compile(r"exited unexpectedly|shared memory|MemoryError|Too many open files|ancdata")


def _explained(error: Exception, readers: Iterable[BaseProcess]) -> Exception:
    """What to do about a reader that died or found no memory; other errors as they are."""
    # One that dies while it hands a batch over breaks the line; its own errors arrive as "Caught ...".
    broken = isinstance(error, OSError | EOFError) and not str(error).startswith("Caught ")
    if not (broken or isinstance(error, MemoryError) or _TROUBLE.search(str(error))):
        return error
    for reader in readers:
        reader.join(0.2)
    ends = {-reader.exitcode for reader in readers if reader.exitcode} & set(signal.valid_signals())
    said = [type(error).__name__, *str(error).split("\n")]
    what = f"stopped by {', '.join(signal.Signals(end).name for end in ends)}" if ends else [s for s in said if s][-1]
    free = f"{SHARED_MEMORY} has {_mib(shutil.disk_usage(SHARED_MEMORY).free)} free" if SHARED_MEMORY.exists() else ""
    return ReadingError(
        f"a process that reads the data could not go on ({what}), most likely for lack of memory (SIGKILL) or of "
        f"shared memory (SIGBUS; {free}): give fewer data.workers, or data.workers=0; a container more --memory or "
        "--shm-size. --resume goes on from the newest state"
    )


def check_shared_memory(
    samples: Samples, subjects: Sequence[CachedSubject], batch_size: int, parts: int, processes: int
) -> None:
    """Read-ahead batches lie in shared memory, of which containers have 64 MiB unless they are given more.

    Args:
        batch_size, parts: samples of a batch, and batches that a step is computed in.
        processes: that train on this machine.

    Raises:
        SettingsError: they do not fit.
    """
    workers = samples.sampling.data.workers
    if not (workers and subjects and SHARED_MEMORY.exists()):
        return
    batch = batch_size * max(samples.sample_bytes(subject) for subject in subjects)
    need, free = processes * batch * (READ_AHEAD * workers + parts), shutil.disk_usage(SHARED_MEMORY).free
    if need <= free:
        return
    fits = (free // (processes * batch) - parts) // READ_AHEAD
    fewer = f"data.workers={fits}, or " if fits > 0 else ""
    raise SettingsError(
        f"data.workers={workers} reads {_mib(need)} ahead on this machine, and {SHARED_MEMORY} has {_mib(free)} free; "
        f"start the container with --shm-size={need // 2**20 + 1}m or more, or give {fewer}data.workers=0"
    )


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C and a scheduler's signals reach every process of a group; the loop alone decides when to stop."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
