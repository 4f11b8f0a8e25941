"""The cases of a run: found, decoded into the cache, and those that cannot be used named."""

import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_fabric import Fabric

from cwdm.errors import CaseError, InputError, SettingsError
from cwdm.files import check_writable, is_file, remove_stale
from cwdm.images import MODALITIES, Subject, find_cases, list_subjects
from cwdm.progress import print_notice
from cwdm.training.cache import Cache, CachedSubject
from cwdm.training.data import Samples
from cwdm.training.launch import gather, on_all_ranks, processes, results_of_all
from cwdm.training.loader import check_shared_memory
from cwdm.training.settings import DataSettings, TrainingSettings

FEWEST = 2
"""Modalities that an incomplete case must have: one to make, and one to make it from."""


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
        if lacking := [str(file) for file in subject.files if not is_file(file)]:
            found.faults.append(CaseError(subject.name, f"expected {', '.join(lacking)}; there is no such file"))
        else:
            found.subjects.append(subject)
    return found


def _find_brats(folder: Path, data: DataSettings) -> Found:
    found, needed = Found([], []), modalities(data)
    for case in find_cases(folder):
        lacking = [modality for modality in needed if modality not in case.files]
        there = [modality for modality in needed if modality in case.files]
        if case.problem or len(there) < (FEWEST if data.incomplete else len(needed)):
            reason = case.problem or f"{', '.join(lacking)} missing; training needs them"
            found.faults.append(CaseError(case.name, reason))
        else:
            absent = tuple(needed.index(modality) for modality in lacking)
            found.subjects.append(Subject(case.name, tuple(case.files[modality] for modality in there), absent))
    return found


def modalities(data: DataSettings) -> tuple[str, ...]:
    """For the layout `brats`: what is read of a case, the target first unless it can be any."""
    if data.target is None:
        return MODALITIES
    others = tuple(modality for modality in MODALITIES if modality != data.target)
    return (data.target, *others) if data.condition_on == "others" else (data.target,)


def find_all(settings: TrainingSettings) -> tuple[Found, Found]:
    """What is trained on and what is held out, when the run's folder can be written."""
    data, out = settings.data, settings.out
    for folder in (out, out / "states", out / "newest", out / "raw", out / "best"):
        check_writable(folder)
        remove_stale(folder)
    held_out = find_subjects(data.validation_path, data) if data.validation_path else Found([], [])
    return find_subjects(data.path, data), Found(held_out.subjects[: settings.validation_cases], held_out.faults)


def decode_all(
    settings: TrainingSettings, fabric: Fabric, found: Found, held_out: Found
) -> tuple[Samples, list[CachedSubject]]:
    """What is trained on, and the held-out cases, decoded; what is wrong with any of them is said at once."""
    data, zero = settings.data, fabric.is_global_zero
    say = print_notice if zero else lambda _: None
    subjects, faults = [*found.subjects, *held_out.subjects], [*found.faults, *held_out.faults]
    cases = len(subjects) + len(faults)
    if faults:
        say(f"{len(faults)} of {cases} cases are incomplete; the others are decoded first")
    folder = data.cache or settings.out / "cache"
    cache = on_all_ranks(fabric, lambda: Cache(folder, data, 2 * settings.unet().size_multiple))
    ready = _decode(settings, fabric, cache, subjects, say)
    faults += [case for case in ready if isinstance(case, CaseError)]
    on_all_ranks(fabric, lambda: leave_out(faults, cases, data, say) if zero else None)
    sound, kept_out = (
        [case for case in part if isinstance(case, CachedSubject)]
        for part in (ready[: len(found.subjects)], ready[len(found.subjects) :])
    )
    if not sound:
        raise InputError(f"no case in {data.path} can be used")
    names = [case.name for case in sound]
    if idle := [pattern for pattern in data.repeat if not fnmatch.filter(names, pattern)]:
        raise SettingsError(f"data.repeat: no case in {data.path} has a name like {', '.join(idle)}")
    _check_shapes(settings, fabric.world_size, sound)
    samples = Samples(sound, cache, settings)
    on_all_ranks(fabric, lambda: _check_memory(samples, fabric))
    return samples, kept_out


def _decode(
    settings: TrainingSettings, fabric: Fabric, cache: Cache, subjects: Sequence[Subject], say: Callable[[str], None]
) -> list[CachedSubject | CaseError]:
    """Each case in the cache, or what is wrong with it; the processes of a machine share its cache and the work."""
    zero, rank, ranks = fabric.is_global_zero, fabric.local_rank, processes(settings)[0]
    looks = results_of_all(fabric, cache.looks(subjects, shown=True) if zero else iter(()))
    digests = fabric.broadcast(on_all_ranks(fabric, lambda: cache.remember(looks) if zero else {}))
    few = on_all_ranks(fabric, lambda: cache.forecast(subjects, digests, say) if rank == 0 else [])
    # Rather than after an hour of decoding.
    on_all_ranks(fabric, lambda: _check_memory(Samples(few, cache, settings), fabric))
    mine = results_of_all(fabric, cache.prepare_all(subjects[rank::ranks], digests, shown=zero))
    results: list[Any] = [None] * len(subjects)
    for places in gather(fabric, dict(zip(range(rank, len(subjects), ranks), mine, strict=True))):
        for place, result in places.items():
            # A case that is bad on one machine is bad.
            results[place] = results[place] if isinstance(results[place], CaseError) else result
    return results


def leave_out(faults: Sequence[CaseError], cases: int, data: DataSettings, say: Callable[[str], None]) -> None:
    """Say which cases cannot be used.

    Args:
        cases: how many there are in all.

    Raises:
        InputError: and the settings do not allow to go on without them.
    """
    if not faults:
        return
    lines = [f"{fault.case}: {fault.reason}" for fault in faults]
    if not data.skip_bad or len(faults) == cases:
        raise InputError(
            f"{len(faults)} of {cases} cases cannot be used:",
            *lines,
            "mend them, or go on without them: data.skip_bad=true",
        )
    for line in lines:
        say(f"left out: {line}")


def _check_shapes(settings: TrainingSettings, processes: int, subjects: Sequence[CachedSubject]) -> None:
    """Windows follow the brain, and volumes that are computed together must be of one size."""
    share = settings.optimiser.batch_size // processes
    if settings.data.crop or share == settings.optimiser.accumulate:
        return
    shapes = {subject.shape for subject in subjects}
    if len(shapes) > 1:
        raise SettingsError(
            f"the volumes differ in size ({min(shapes)} to {max(shapes)}), so that whole ones cannot be computed "
            f"together; give data.crop, or optimiser.accumulate={share}"
        )


def _check_memory(samples: Samples, fabric: Fabric) -> None:
    if fabric.local_rank == 0:
        check_shared_memory(samples, fabric.world_size, processes(samples.settings)[0])
