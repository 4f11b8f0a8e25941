"""What training sees: the cases, decoded, and the samples of each step."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.data import default_collate

from cwdm.errors import CaseError, InputError
from cwdm.files import check_apart, check_writable, remove_stale
from cwdm.images import Subject
from cwdm.progress import to_stderr
from cwdm.training.datasets import (
    Found,
    SampleNumbers,
    Samples,
    Sampling,
    assemble,
    check_shared_memory,
    find_subjects,
    leave_out,
    read_batches,
)
from cwdm.training.launch import check_shapes, gather, processes, together
from cwdm.training.settings import TrainingSettings
from cwdm.training.state import Run
from cwdm.training.volume_cache import Cache, CachedSubject
from cwdm.wavelet import dwt

REGRESSION_SAMPLES = 480


def find_data(settings: TrainingSettings) -> tuple[Found, Found]:
    """What is trained on and what is held out, when the run's folder can be written."""
    data, out = settings.data, settings.out
    for folder in filter(None, (data.path, data.validation_path)):
        check_apart(out, folder)
    for folder in (out, out / "states", out / "newest", out / "raw", out / "best"):
        check_writable(folder)
        remove_stale(folder)
    held_out = find_subjects(data.validation_path, data) if data.validation_path else Found([], [])
    return find_subjects(data.path, data), Found(held_out.subjects[: settings.validation_cases], held_out.faults)


def load_data(
    settings: TrainingSettings, fabric: Fabric, found: Found, held_out: Found
) -> tuple[Cache, list[CachedSubject], list[CachedSubject]]:
    """The cases, decoded; what is wrong with any of them is said at once."""
    data, zero = settings.data, fabric.is_global_zero
    say = partial(to_stderr().print, markup=False, soft_wrap=True) if zero else _say_nothing
    subjects, faults = [*found.subjects, *held_out.subjects], [*found.faults, *held_out.faults]
    cases = len(subjects) + len(faults)
    if faults:
        say(f"{len(faults)} of {cases} cases are incomplete; the others are decoded first")
    folder = data.cache or settings.out / "cache"
    cache = together(fabric, lambda: Cache(folder, data, 2 * settings.unet().size_multiple))
    ready = _decode_all(settings, fabric, cache, subjects, say)
    faults += [case for case in ready if isinstance(case, CaseError)]
    together(fabric, lambda: leave_out(faults, cases, data, say) if zero else None)
    sound, kept_out = (
        [case for case in part if isinstance(case, CachedSubject)]
        for part in (ready[: len(found.subjects)], ready[len(found.subjects) :])
    )
    if not sound:
        raise InputError(f"no case in {data.path} can be used")
    check_shapes(settings, fabric.world_size, sound)
    together(fabric, lambda: _check_memory(settings, fabric, cache, sound))
    return cache, sound, kept_out


def _decode_all(
    settings: TrainingSettings, fabric: Fabric, cache: Cache, subjects: Sequence[Subject], say: Callable[[str], None]
) -> list[CachedSubject | CaseError]:
    """Each case in the cache, or what is wrong with it; the processes of a machine share its cache and the work."""
    zero, rank, ranks = fabric.is_global_zero, fabric.local_rank, processes(settings)[0]
    digests = fabric.broadcast(together(fabric, lambda: cache.digests(subjects, shown=True) if zero else {}))
    few = together(fabric, lambda: cache.forecast(subjects, digests, say) if rank == 0 else [])
    together(fabric, lambda: _check_memory(settings, fabric, cache, few))  # rather than after an hour
    mine = together(fabric, lambda: cache.prepare_all(subjects[rank::ranks], digests, shown=zero))
    results: list[Any] = [None] * len(subjects)
    for places in gather(fabric, dict(zip(range(rank, len(subjects), ranks), mine, strict=True))):
        for place, result in places.items():
            # A case that is bad on one machine is bad.
            results[place] = results[place] if isinstance(results[place], CaseError) else result
    return results


def _check_memory(settings: TrainingSettings, fabric: Fabric, cache: Cache, subjects: Sequence[CachedSubject]) -> None:
    if fabric.local_rank == 0:
        parts = settings.optimiser.accumulate
        size = settings.optimiser.batch_size // fabric.world_size // parts
        check_shared_memory(samples(settings, subjects, cache), subjects, size, parts, processes(settings)[0])


def _say_nothing(_: str) -> None:
    pass


def sampling(settings: TrainingSettings) -> Sampling:
    low, high = settings.value_range
    return Sampling(settings.data, settings.seed, (low, high), settings.loss.timestep_power, settings.noise)


def samples(settings: TrainingSettings, subjects: Sequence[CachedSubject], cache: Cache) -> Samples:
    return Samples(subjects, cache, sampling(settings))


def examples(samples: Samples, settings: TrainingSettings) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Coefficients of conditions and target of the run's first samples, for `Regression.fit`.

    Learned from are those whose eight voxels all lie in the brain: at its rim every contrast falls to 0 at once, which
    says much of the rim and nothing of how one contrast follows from the others.
    """
    wavelet, background = settings.network.wavelet, settings.value_range[0]
    for n in range(REGRESSION_SAMPLES):
        sample = assemble(default_collate([samples[n]]), samples.sampling, torch.device("cpu"))
        conditions = sample["conditions"]
        outside = (conditions == background).all(1).float()
        inside = F.max_pool3d(outside, 2)[0] == 0
        yield dwt(conditions, wavelet)[0], dwt(sample["volume"], wavelet)[0], inside, int(sample["target"])


def batches(run: Run) -> Iterator[list[dict[str, Tensor]]]:
    """What this process computes in each step that is left, in parts."""
    optimiser, fabric = run.settings.optimiser, run.fabric
    share = optimiser.batch_size // fabric.world_size
    left = range(run.step, run.settings.steps)
    numbers = SampleNumbers(left, optimiser.batch_size, fabric.global_rank * share, share)
    source = samples(run.settings, run.subjects, run.cache)
    read = read_batches(source, numbers, share // optimiser.accumulate, fabric.device.type == "cuda")
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
