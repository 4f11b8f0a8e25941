"""A cohort over a Ray cluster: each worker takes the next case when it has done one.

Needs the extra `ray`, cwdm on every machine, and folders that all of them see under the same paths.
"""

import os
import signal
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no network unless asked for
import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.exceptions import RayError as AnyRayError
from rich.console import Console

from cwdm.brats import CaseFolder
from cwdm.cohort import Outcome, outcome_line, synthesise_cohort
from cwdm.config import Settings
from cwdm.errors import CwdmError
from cwdm.progress import CohortProgress
from cwdm.synthesis import Synthesizer

LOST = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)
"""A worker that is gone: killed, or for want of memory by Ray, or with its machine."""

ATTEMPTS = 3
"""Workers that may die over one case before it counts as failed: it may be the one that kills them."""


@dataclass(frozen=True)
class Work:
    """What every worker does with a case; the arguments of `Synthesizer` and `synthesise_cohort`."""

    weights: Path | str | None
    settings: Settings
    device: str
    output: Path
    overwrite: bool = False
    report: Path | None = None


class _Worker:
    """Lives in a process of its own, somewhere in the cluster."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.synthesizer: Synthesizer | None = None

    def run(self, folder: CaseFolder) -> list[Outcome] | CwdmError:
        """Synthesise one case; what no other case could do without either (weights, output) is given back."""
        work, quiet = self.work, CohortProgress(1, Console(quiet=True))
        try:
            # Not when the worker starts, where Ray would hide the reason.
            self.synthesizer = self.synthesizer or Synthesizer(work.weights, work.settings, work.device)
            return synthesise_cohort(
                [folder],
                self.synthesizer,
                work.output,
                overwrite=work.overwrite,
                report=work.report,
                progress=quiet,
            )
        except CwdmError as error:
            return error


def synthesise_on_ray(
    folders: Sequence[CaseFolder],
    work: Work,
    progress: CohortProgress,
    address: str | None = None,
    workers: int | None = None,
) -> list[Outcome]:
    """Like `cohort.synthesise_cohort`, over a cluster: a case whose worker is lost goes to another one.

    A finished case is never computed again: its file is there, and whoever gets it next skips it.

    Args:
        address: of the cluster; None for one on this machine, started for this run.
        workers: how many; None for one a GPU, or where there is none one for every four cores.

    Raises:
        CwdmError: no cluster at the address, or no worker there can use the weights or the device.
        OutputError: an output folder cannot be written or is full.
    """
    _join(address)
    try:
        with progress:
            return _Pool(work, progress, len(folders), workers).run(folders)
    finally:
        ray.shutdown()


def _join(address: str | None) -> None:
    """Connect to the cluster, or start one; the signals stay with whoever handles them now."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    local = {"include_dashboard": False} if address is None else {}
    try:
        if address is not None and address != "auto":
            _check_reachable(address)
        ray.init(address=address, log_to_driver=False, configure_logging=False, **local)
    except (OSError, AnyRayError, RuntimeError, ValueError) as error:
        raise CwdmError(f"no Ray cluster at {address or 'this machine'}: {_first_line(error)}") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes; raises OSError or ValueError."""
    place = urlsplit(address if "//" in address else f"//{address}")
    with socket.create_connection((place.hostname or "", place.port or 10001), timeout=10):
        pass


class _Pool:
    """The workers, and which case each of them has."""

    def __init__(self, work: Work, progress: CohortProgress, total: int, workers: int | None) -> None:
        self.work, self.progress, self.total = work, progress, total
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
        self.on_gpus = work.device != "cpu" and gpus > 0
        cores = [int(machine.get("CPU", 0)) for machine in machines]
        default, most = (gpus, gpus) if self.on_gpus else (sum(max(1, n // 4) for n in cores if n), sum(cores))
        # Ray lets a worker for whom there is no place wait for ever.
        self.count = max(1, min(workers or default, most, total))
        self.cores = 1 if self.on_gpus else cores_each(cores, self.count)
        self.busy: dict[Any, tuple[Any, CaseFolder]] = {}
        self.outcomes: list[Outcome] = []
        self.lost: dict[str, int] = {}

    def run(self, folders: Sequence[CaseFolder]) -> list[Outcome]:
        # Cases that miss the same contrast follow each other, so that a worker seldom loads other weights.
        waiting = deque(sorted(folders, key=lambda folder: (folder.missing, folder.name)))
        for _ in range(min(self.count, len(waiting))):
            self.give(self.hire(), waiting.popleft())
        while self.busy:
            (done,), _ = ray.wait(list(self.busy), num_returns=1)
            worker, folder = self.busy.pop(done)
            try:
                outcomes = ray.get(done)
            except LOST as error:
                worker = self.hire()
                self.replace(folder, waiting, error)
            except AnyRayError as error:
                raise CwdmError(f"{folder.name}: the worker failed: {_first_line(error)}") from error
            else:
                self.end(outcomes)
            if waiting:
                self.give(worker, waiting.popleft())
            else:
                del worker  # and Ray has its place for one that waits
        return self.outcomes

    def hire(self) -> Any:
        """A new worker; Ray finds it a place."""
        needs = {"num_cpus": self.cores, "num_gpus": 1 if self.on_gpus else 0}
        environment = {"env_vars": {"OMP_NUM_THREADS": str(self.cores)}}
        return ray.remote(_Worker).options(**needs, runtime_env=environment).remote(self.work)

    def give(self, worker: Any, folder: CaseFolder) -> None:
        self.busy[worker.run.remote(folder)] = worker, folder

    def replace(self, folder: CaseFolder, waiting: deque[CaseFolder], error: Exception) -> None:
        """A worker died over this case: back to the others with it, unless it was too often."""
        self.lost[folder.name] = self.lost.get(folder.name, 0) + 1
        reason = f"its worker was lost ({_first_line(error)})"
        if self.lost[folder.name] < ATTEMPTS:
            self.progress.log(f"{folder.name}: {reason}; another one takes it")
            waiting.appendleft(folder)
        else:
            self.end([Outcome(folder.name, folder.target, "failed", f"{reason}, {ATTEMPTS} times")])

    def end(self, outcomes: list[Outcome] | CwdmError) -> None:
        """What became of a case, which may be several volumes."""
        if isinstance(outcomes, CwdmError):
            raise outcomes
        self.total += len(outcomes) - 1
        self.progress.expect(self.total)
        for outcome in outcomes:
            self.outcomes.append(outcome)
            self.progress.end_case(f"[{len(self.outcomes)}/{self.total}] {outcome_line(outcome)}")


def cores_each(machines: Sequence[int], workers: int) -> int:
    """The most cores that each of so many workers can have, none of them on two machines; 1 if there are too few."""
    fitting = (n for n in range(max(machines), 1, -1) if sum(cores // n for cores in machines) >= workers)
    return next(fitting, 1)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
