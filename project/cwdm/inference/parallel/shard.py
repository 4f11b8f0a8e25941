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

T = TypeVar("T")


def share(items: Sequence[T], names: Sequence[str], shard: str, environment: Mapping[str, str] = os.environ) -> list[T]:
    """The items, each with a name, of a shard given as for `place`."""
    index, count = place(shard, environment)
    return [item for item, name in zip(items, names, strict=True) if _number(name) % count == index]


def _number(name: str) -> int:
    """The same on every machine, unlike Python's own hash."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8])


def place(shard: str, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """i and n of a shard "i/n", i from 0 to n - 1, or "auto": the place among a scheduler's jobs.

    "auto" reads Slurm's job array and the tasks of `srun`, else Kubernetes' JOB_COMPLETION_INDEX with
    JOB_COMPLETIONS, which the job's file has to set.

    Raises:
        InputError: not such a shard, or no scheduler where "auto" was asked for.
    """
    return _of_scheduler(environment) if shard == "auto" else _parse(shard)


def _parse(shard: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard, re.ASCII)
    if not match or not int(match[1]) < int(match[2]):
        raise InputError(f"--shard {shard}: give i/n with i from 0 to n - 1, such as 0/8, or auto")
    return int(match[1]), int(match[2])


def _of_scheduler(environment: Mapping[str, str]) -> tuple[int, int]:
    # In a batch script, and in the shell of salloc, these variables are there too, but there is one process.
    tasks = int(environment.get("SLURM_NTASKS", 1))
    if tasks > 1 and tasks != int(environment.get("SLURM_STEP_NUM_TASKS", 1)):
        raise InputError(
            f"--shard auto: the Slurm job has {environment['SLURM_NTASKS']} tasks, and this is not one of them, so the "
            "cases of the others would be nobody's; start it with srun, or ask for one task (--ntasks=1)"
        )
    places = [
        _parse(f"{int(environment[index]) - offset}/{environment[size]}")
        for index, size, offset in (
            ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", _start_of_array(environment)),
            ("SLURM_PROCID", "SLURM_NTASKS", 0),
            ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS", 0),
        )
        if index in environment and size in environment
    ]
    if not places:
        raise InputError(
            "--shard auto: no Slurm job array (SLURM_ARRAY_TASK_ID, _COUNT), Slurm tasks (SLURM_PROCID, SLURM_NTASKS) "
            "or Kubernetes job (JOB_COMPLETION_INDEX, JOB_COMPLETIONS); give i/n"
        )
    index, count = places[0]
    for inner, size in places[1:]:  # the tasks of each job of an array share its cases
        index, count = index * size + inner, count * size
    return index, count


def _start_of_array(environment: Mapping[str, str]) -> int:
    """The first number of a Slurm job array, which must have no gaps: a gap's cases would be nobody's."""
    first, last, count = (int(environment.get(f"SLURM_ARRAY_TASK_{name}", 0)) for name in ("MIN", "MAX", "COUNT"))
    if "SLURM_ARRAY_TASK_MAX" in environment and last - first + 1 != count:
        raise InputError(
            f"--shard auto: the job array has {count} jobs from {first} to {last}, and the cases of those left out "
            "would be nobody's; give i/n, or an array without gaps such as 0-7"
        )
    return first
