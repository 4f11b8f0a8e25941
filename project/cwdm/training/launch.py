"""Devices and processes of a training run, and what they do together."""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from cwdm.device import choose_device
from cwdm.errors import CwdmError, SettingsError
from cwdm.slurm import slurm_job
from cwdm.training.settings import TrainingSettings

T = TypeVar("T")


PATIENCE_MIN = 30
"""How long processes wait for one that died or hangs, where no launcher ends them before."""

BETWEEN_MEETINGS_S = 60
"""Longest work of a process, but for a last case of it, before it hears how the others are: see `results_of_all`."""


class TrainingError(CwdmError):
    """The run cannot go on."""


class LostProcessError(TrainingError):
    """Another process of the run died or hangs, so that nothing more can be done together."""


def launch(settings: TrainingSettings) -> Fabric:
    """Devices and processes; under `torchrun` or Slurm Fabric takes its place among those that are there."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device=cuda, but PyTorch finds no GPU; check the driver, or train with device=cpu")
    device = "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"
    devices, nodes = processes(settings)
    _check_shares(settings, devices * nodes)
    strategy: Any = DDPStrategy(timeout=timedelta(minutes=PATIENCE_MIN)) if devices * nodes > 1 else "auto"
    precision: Any = "bf16-mixed" if settings.precision == "bf16" else "32-true"
    # In a batch script Slurm's variables are there too, and Fabric would wait for tasks that no one started.
    waits = (job := slurm_job()) and not job.is_task and not torch.distributed.is_torchelastic_launched()
    alone: Any = LightningEnvironment() if waits else None
    try:
        fabric = Fabric(
            accelerator=device, strategy=strategy, devices=devices, num_nodes=nodes, precision=precision, plugins=alone
        )
        fabric.launch()
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise SettingsError(f"{devices} devices on each of {nodes} machines cannot be used: {error}") from error
    if fabric.world_size != devices * nodes:
        raise SettingsError(
            f"{devices} devices on each of {nodes} machines were asked for, and {fabric.world_size} processes run; "
            "under Slurm start a task for each device with srun"
        )
    choose_device(str(fabric.device))  # tries it
    return fabric


def _check_shares(settings: TrainingSettings, processes: int) -> None:
    """Every process gets as many volumes of a step as the others, in equal parts."""
    batch, parts = settings.optimiser.batch_size, processes * settings.optimiser.accumulate
    if batch % parts:
        raise SettingsError(
            f"optimiser.batch_size {batch} cannot be shared evenly among {processes} devices in "
            f"{settings.optimiser.accumulate} parts each; give optimiser.batch_size={-(-batch // parts) * parts}"
        )


def processes(settings: TrainingSettings) -> tuple[int, int]:
    """Devices of each machine, and machines: as `torchrun` or Slurm started them, else as the settings say."""
    if torch.distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        return devices, int(os.environ["WORLD_SIZE"]) // devices
    if (job := slurm_job()) and job.is_task:
        return job.tasks // job.nodes, job.nodes
    return settings.devices, settings.nodes


@contextmanager
def lost_processes_told() -> Iterator[None]:
    """A block in which processes talk; raises LostProcessError where one does not answer any more."""
    try:
        yield
    except RuntimeError as error:  # of the backends, only NCCL's has a type of its own
        if not (isinstance(error, torch.distributed.DistError) or _NO_ANSWER.search(str(error))):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise LostProcessError(
            "another process of this run died or hangs; what it or its launcher said last tells why (a line 'Killed', "
            f"or SIGKILL, means lack of memory). --resume goes on from the newest state ({reason})"
        ) from error


_NO_ANSWER = re.compile(r"gloo|NCCL|Connection (reset|closed) by peer")


def on_all_ranks(fabric: Fabric, work: Callable[[], T]) -> T:
    """Do something in every process; if it fails in one, the others stop too instead of waiting for ever."""
    fault: Exception | None = None
    try:
        done = work()
    except Exception as error:
        fault = error
    (failed,) = largest(fabric, fault is not None)
    if fault:
        raise fault
    if failed:
        raise TrainingError("another process failed; its message says why")
    return done


def results_of_all(fabric: Fabric, results: Iterator[T]) -> list[T]:
    """This process's results of long work. Meanwhile the processes meet, so that none waits long for one that is lost.

    Args:
        results: made one by one as they are taken.
    """
    done: list[T] = []
    while any(largest(fabric, on_all_ranks(fabric, lambda: _take_some(results, done)))):
        pass
    return done


def _take_some(results: Iterator[T], done: list[T]) -> bool:
    """Whether there may be more."""
    start = time.monotonic()
    for result in results:
        done.append(result)
        if time.monotonic() - start > BETWEEN_MEETINGS_S:
            return True
    return False


def gather(fabric: Fabric, mine: T) -> list[T]:
    """What each process has."""
    everyone: list[Any] = [mine] * fabric.world_size
    if fabric.world_size > 1:
        torch.distributed.all_gather_object(everyone, mine)
    return everyone


def largest(fabric: Fabric, *numbers: int) -> tuple[int, ...]:
    """The largest of each of the numbers that the processes give, the same answer in all of them."""
    if fabric.world_size == 1:
        return numbers
    given = torch.tensor([int(number) for number in numbers], device=fabric.device)
    return tuple(cast(Tensor, fabric.all_reduce(given, reduce_op="max")).tolist())
