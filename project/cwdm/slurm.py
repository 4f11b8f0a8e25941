"""What Slurm tells a process about its job: the only place that reads Slurm's variables."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cwdm.errors import InputError


@dataclass(frozen=True)
class SlurmJob:
    """The job that a process belongs to.

    Attributes:
        tasks, nodes: of the job.
        task: number of this process among the tasks. There is one in a batch script and in the shell of salloc too,
            where nobody has started the others: see `is_task`.
        step_tasks: tasks of the step that this process belongs to, 1 in such a script or shell.
        array_task, array_tasks: number of this job in its array, and of how many; None for a job of its own.
        array_first, array_last: the numbers at the array's ends; `array_last` is None where Slurm does not say.
    """

    tasks: int
    nodes: int
    task: int | None
    step_tasks: int
    array_task: int | None
    array_tasks: int | None
    array_first: int
    array_last: int | None

    @property
    def is_task(self) -> bool:
        """Whether `srun` started this process as one of several."""
        return self.task is not None and self.step_tasks > 1


def whole_number(environment: Mapping[str, str], name: str) -> int | None:
    """What a scheduler's variable says, None where it is not set; raises InputError where it is no whole number."""
    text = environment.get(name)
    if text is not None and not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise InputError(f"the variable {name}: expected a whole number, found {text!r}; set it right, or unset it")
    return None if text is None else int(text)


def slurm_job(environment: Mapping[str, str] = os.environ) -> SlurmJob | None:
    """The job of this process; None outside of Slurm.

    Raises:
        InputError: a variable of Slurm's is no whole number.
    """

    def number(name: str) -> int | None:
        return whole_number(environment, f"SLURM_{name}")

    if not any(f"SLURM_{name}" in environment for name in ("NTASKS", "PROCID", "ARRAY_TASK_ID")):
        return None
    return SlurmJob(
        tasks=number("NTASKS") or 1,
        nodes=number("NNODES") or 1,
        task=number("PROCID") if "SLURM_NTASKS" in environment else None,
        step_tasks=number("STEP_NUM_TASKS") or 1,
        array_task=number("ARRAY_TASK_ID"),
        array_tasks=number("ARRAY_TASK_COUNT"),
        array_first=number("ARRAY_TASK_MIN") or 0,
        array_last=number("ARRAY_TASK_MAX"),
    )
