"""One job's share of a cohort: by a checksum of each case's name, so that shares are disjoint and together everything.

A case's share hangs on nothing but its name: where jobs start at different times and find other cases, because some
came or went, none falls between them. Shares are of one size only on average.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from cwdm.errors import InputError
from cwdm.slurm import SlurmJob, slurm_job, whole_number

T = TypeVar("T")


def select_shard(
    items: Sequence[T], names: Sequence[str], shard: str, environment: Mapping[str, str] = os.environ
) -> list[T]:
    """The items, each with a name, of a shard given as for `parse_shard`."""
    index, count = parse_shard(shard, environment)
    return [item for item, name in zip(items, names, strict=True) if _number(name) % count == index]


def _number(name: str) -> int:
    """The same on every machine, unlike Python's own hash."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8])


def parse_shard(shard: str, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """i and n of a shard "i/n", i from 0 to n - 1, or "auto": the place among a scheduler's jobs.

    "auto" reads Slurm's job array and the tasks of `srun`, else Kubernetes' JOB_COMPLETION_INDEX with
    JOB_COMPLETIONS, which the job's file has to set.

    Raises:
        InputError: not such a shard, or no scheduler where "auto" was asked for, or its variables make no sense.
    """
    return _of_scheduler(environment) if shard == "auto" else _parse(shard)


def _parse(shard: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard, re.ASCII)
    if not match or not int(match[1]) < int(match[2]):
        raise InputError(f"--shard {shard}: give i/n with i from 0 to n - 1, such as 0/8, or auto")
    return int(match[1]), int(match[2])


def _of_scheduler(environment: Mapping[str, str]) -> tuple[int, int]:
    places = _of_slurm(job) if (job := slurm_job(environment)) else []
    index, count = (whole_number(environment, name) for name in ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"))
    if index is not None and count is not None:
        places.append(_place(index, count, "JOB_COMPLETION_INDEX and JOB_COMPLETIONS"))
    if not places:
        raise InputError(
            "--shard auto: no Slurm job array (SLURM_ARRAY_TASK_ID, _COUNT), Slurm tasks (SLURM_PROCID, SLURM_NTASKS) "
            "or Kubernetes job (JOB_COMPLETION_INDEX, JOB_COMPLETIONS); give i/n"
        )
    shard, shards = places[0]
    for inner, size in places[1:]:  # the tasks of each job of an array share its cases
        shard, shards = shard * size + inner, shards * size
    return shard, shards


def _place(index: int, count: int, names: str) -> tuple[int, int]:
    if not 0 <= index < count:
        raise InputError(f"--shard auto: {names} say {index} of {count}, counted from 0; set them right, or give i/n")
    return index, count


def _of_slurm(job: SlurmJob) -> list[tuple[int, int]]:
    """The job's place in its array, and this process's among the job's tasks."""
    if job.tasks > 1 and job.tasks != job.step_tasks:
        raise InputError(
            f"--shard auto: the Slurm job has {job.tasks} tasks, and this is not one of them, so nobody would do the "
            "cases of the others; start it with srun, or ask for one task (--ntasks=1)"
        )
    places = []
    if job.array_task is not None and job.array_tasks is not None:
        if job.array_last is not None and job.array_last - job.array_first + 1 != job.array_tasks:
            raise InputError(
                f"--shard auto: the job array has {job.array_tasks} jobs from {job.array_first} to {job.array_last}, "
                "and nobody would do the cases of those left out; give i/n, or an array without gaps such as 0-7"
            )
        places.append(_place(job.array_task - job.array_first, job.array_tasks, "SLURM_ARRAY_TASK_ID and _COUNT"))
    if job.task is not None:
        places.append(_place(job.task, job.tasks, "SLURM_PROCID and SLURM_NTASKS"))
    return places
