"""What training sees: the cases, decoded, and the samples of each step."""

import signal
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from cwdm.datasets import Cache, Samples, Sampling, Subject, find_subjects
from cwdm.files import check_apart, check_writable, remove_stale
from cwdm.progress import bars
from cwdm.train_config import TrainingSettings
from cwdm.training.state import Run
from cwdm.wavelet import dwt

REGRESSION_SAMPLES = 480
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that stop a run; Slurm sends SIGUSR1 before a job's time is up, where `--signal=USR1@120` asks for it."""


def find_data(settings: TrainingSettings) -> tuple[list[Subject], list[Subject]]:
    """What is trained on and what is held out, when the run's folder can be written."""
    data, out = settings.data, settings.out
    for folder in filter(None, (data.path, data.validation_path)):
        check_apart(out, folder)
    for folder in (out, out / "states", out / "newest", out / "raw", out / "best"):
        check_writable(folder)
        remove_stale(folder)
    held_out = find_subjects(data.validation_path, data)[: settings.validation_cases] if data.validation_path else []
    return find_subjects(data.path, data), held_out


def decode_all(cache: Cache, subjects: Sequence[Subject], shown: bool) -> None:
    """Fill the cache."""
    with bars(shown=shown) as bar:
        for subject in bar.track(subjects, description="decoding"):
            cache.load(subject)


def samples(settings: TrainingSettings, subjects: Sequence[Subject], cache: Cache) -> Samples:
    """The samples of a run, by number."""
    low, high = settings.value_range
    return Samples(subjects, cache, Sampling(settings.data, settings.seed, (low, high), settings.loss.timestep_power))


def examples(samples: Samples, settings: TrainingSettings) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Coefficients of conditions and target of the run's first samples, for `Regression.fit`.

    Learned from are those whose eight voxels all lie in the brain: at its rim every contrast falls to 0 at once, which
    says much of the rim and nothing of how one contrast follows from the others.
    """
    wavelet, background = settings.network.wavelet, settings.value_range[0]
    for n in range(REGRESSION_SAMPLES):
        sample = samples[n]
        conditions = sample["conditions"][None]
        outside = (conditions == background).all(1).float()
        inside = F.max_pool3d(outside, 2)[0] == 0
        yield dwt(conditions, wavelet)[0], dwt(sample["volume"][None], wavelet)[0], inside, int(sample["target"])


def batches(run: Run) -> Iterator[list[dict[str, Tensor]]]:
    """What this process computes in each step that is left, in parts."""
    optimiser, fabric = run.settings.optimiser, run.fabric
    share = optimiser.batch_size // fabric.world_size
    numbers = [
        step * optimiser.batch_size + fabric.global_rank * share + i
        for step in range(run.step, run.settings.steps)
        for i in range(share)
    ]
    workers = run.settings.data.workers
    loader = DataLoader(
        samples(run.settings, run.subjects, run.cache),
        batch_size=share // optimiser.accumulate,
        sampler=numbers,
        num_workers=workers,
        pin_memory=fabric.device.type == "cuda",
        worker_init_fn=_ignore_interrupts,
        persistent_workers=workers > 0,
    )
    read = iter(loader)
    while run.step < run.settings.steps:
        start = time.perf_counter()
        parts = [next(read) for _ in range(optimiser.accumulate)]
        run.log.waited += time.perf_counter() - start
        yield parts


def names(run: Run, step: int, chosen: Tensor) -> str:
    """Names of those cases of a step's batch that are chosen, (B,) bool."""
    first = step * len(chosen)
    read = samples(run.settings, run.subjects, run.cache)
    return ", ".join(read.subject(first + int(i)).name for i in chosen.nonzero())


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C and a scheduler's signals reach every process of a group; the loop alone decides when to stop."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
