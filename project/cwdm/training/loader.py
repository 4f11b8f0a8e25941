"""Batches for this process: its part of every step, read ahead by other processes.

When one of those dies or finds no memory, the error says what to do.
"""

import atexit
import multiprocessing
import re
import shutil
import signal
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from cwdm import signals
from cwdm.errors import CwdmError, SettingsError
from cwdm.files import exists
from cwdm.training.data import Samples
from cwdm.training.launch import TrainingError

SHARED_MEMORY = Path("/dev/shm")  # where processes that read put what they have read
READ_AHEAD = 2
"""Batches for each process that reads."""

STOPPING = (*signals.STOPPING, signal.SIGHUP, signal.SIGUSR1)
"""Signals that stop a run; SIGHUP comes when its terminal is closed, SIGUSR1 from Slurm before a job's time is up,
where `--signal=USR1@120` asks for it."""


def batches_of_steps(samples: Samples, fabric: Fabric, steps: range) -> Iterator[dict[str, Tensor]]:
    """What this process computes in each of the steps, `optimiser.accumulate` batches a step; see `read_batches`."""
    optimiser = samples.settings.optimiser
    share = optimiser.batch_size // fabric.world_size
    numbers = batch_numbers(steps, optimiser.batch_size, fabric.global_rank * share, share, optimiser.accumulate)
    return read_batches(samples, numbers, pinned=fabric.device.type == "cuda")


def batch_numbers(steps: range, batch_size: int, first: int, share: int, parts: int) -> Iterator[list[int]]:
    """Numbers of the samples of each batch of one process; counted, not listed, as a run has millions.

    Args:
        batch_size: samples of a step in all processes.
        first, share: this process's part of a step.
        parts: batches that this is computed in.
    """
    size = share // parts
    for step in steps:
        start = step * batch_size + first
        yield from (list(range(n, n + size)) for n in range(start, start + share, size))


class _Batches(Dataset[Any]):
    """Batches, or the error that a person should read: torch would turn it into a traceback on its way here."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, numbers: list[int]) -> dict[str, Tensor] | CwdmError:
        try:
            batch: dict[str, Tensor] = default_collate([self.samples[n] for n in numbers])
            return batch
        except CwdmError as error:
            return error


def read_batches(samples: Samples, numbers: Iterable[list[int]], pinned: bool = False) -> Iterator[dict[str, Tensor]]:
    """Batches of these samples, read ahead by `data.workers` processes.

    Raises:
        CaseError, OutputError: see `Cache.load`.
        TrainingError: a process died, or there is too little memory.
    """
    workers, handler = samples.settings.data.workers, signal.getsignal(signal.SIGCHLD)
    others = set(multiprocessing.active_children())
    with warnings.catch_warnings():  # more readers than cores are no fault: they wait for the disk, too
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader: DataLoader[Any] = DataLoader(
            _Batches(samples),
            batch_size=None,  # its items are batches already
            sampler=numbers,
            num_workers=workers,
            prefetch_factor=READ_AHEAD if workers else None,
            pin_memory=pinned,
            worker_init_fn=_start_reader,
        )
        batches = iter(loader)
    readers = set(multiprocessing.active_children()) - others
    # torch would raise wherever the loop is when a reader dies, be it in the middle of the optimiser's step.
    signal.signal(signal.SIGCHLD, handler)

    # Python ends daemons with the SIGTERM that they ignore, and would wait for them for ever.
    @atexit.register
    def stop() -> None:
        for reader in readers:
            reader.kill()

    try:
        while (batch := _next(batches, readers)) is not None:
            yield batch
    finally:
        stop()
        atexit.unregister(stop)


def _start_reader(_: int) -> None:
    """Ctrl-C and a scheduler's signals reach every process of a group; the loop alone decides when to stop."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _next(batches: Iterator[Any], readers: Iterable[BaseProcess]) -> dict[str, Tensor] | None:
    try:
        batch = next(batches, None)
    except (RuntimeError, MemoryError, OSError, EOFError) as error:
        raise _explained(error, readers) from error
    if isinstance(batch, CwdmError):
        raise batch
    return batch


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
    free = f"{SHARED_MEMORY} has {_mib(shutil.disk_usage(SHARED_MEMORY).free)} free" if exists(SHARED_MEMORY) else ""
    return TrainingError(
        f"a process that reads the data could not go on ({what}), most likely for lack of memory (SIGKILL) or of "
        f"shared memory (SIGBUS; {free}): give fewer data.workers, or data.workers=0; a container more --memory or "
        "--shm-size. --resume goes on from the newest state"
    )


def check_shared_memory(samples: Samples, processes: int, here: int) -> None:
    """Read-ahead batches lie in shared memory, of which containers have 64 MiB unless they are given more.

    Args:
        processes: that train.
        here: of them, on this machine.

    Raises:
        SettingsError: they do not fit.
    """
    workers, optimiser = samples.settings.data.workers, samples.settings.optimiser
    if not (workers and samples.subjects and exists(SHARED_MEMORY)):
        return
    share = optimiser.batch_size // processes // optimiser.accumulate
    batches = here * share * max(samples.bytes_of(subject) for subject in samples.subjects)
    need, free = batches * (READ_AHEAD * workers + optimiser.accumulate), shutil.disk_usage(SHARED_MEMORY).free
    if need <= free:
        return
    fits = (free // batches - optimiser.accumulate) // READ_AHEAD
    fewer = f"data.workers={fits}, or " if fits > 0 else ""
    raise SettingsError(
        f"data.workers={workers} reads {_mib(need)} ahead on this machine, and {SHARED_MEMORY} has {_mib(free)} free; "
        f"start the container with --shm-size={need // 2**20 + 1}m or more, or give {fewer}data.workers=0"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
