"""A cohort over a Ray cluster: each worker takes the next case when it has done one.

Needs the extra `ray`, cwdm on every machine, and folders that all of them see under the same paths.
"""

import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no network unless asked for
import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.exceptions import RayError as AnyRayError

from cwdm.errors import CwdmError, DeviceLostError, SettingsError
from cwdm.images import CaseFolder
from cwdm.inference.cohort import Runner, Work
from cwdm.inference.outcome import Outcome
from cwdm.inference.parallel.dispatch import IDLE, Lost, Message, start_synthesizer, synthesise_among
from cwdm.inference.plan import Task
from cwdm.progress import CohortProgress
from cwdm.signals import deferred, handled

LOST = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)
"""A worker that is gone: killed, or for want of memory by Ray, or with its machine."""


class _Worker:
    """Lives in a process of its own, somewhere in the cluster."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def begin(self) -> Message:
        """What `__init__` should do, of which Ray would hide the reasons."""
        try:
            self.synthesizer = start_synthesizer(self.work)
        except DeviceLostError as error:
            return Lost(str(error))
        except CwdmError as error:
            return error
        return IDLE

    def run(self, tasks: list[Task]) -> list[Outcome] | Message:
        """Synthesise; what no other worker could do without either is given back."""
        work, outcomes = self.work, list[Outcome]()
        progress = CohortProgress(0)  # on standard error, which Ray keeps in the worker's log
        try:
            runner = Runner(self.synthesizer, work.output, work.report, work.overwrite, progress, outcomes.append)
            runner.run(tasks)
        except DeviceLostError as error:
            return Lost(str(error))
        except CwdmError as error:
            return error
        return outcomes


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
        # Ray makes a KeyboardInterrupt of whatever ends its waiting.
        with deferred() as stopped_by:
            group = _RayGroup(work, workers, len(folders), stopped_by)
            return synthesise_among(group, folders, work, progress)
    finally:
        ray.shutdown()


def _join(address: str | None) -> None:
    """Connect to the cluster, or start one; the signals stay with whoever handles them now."""
    local = {"include_dashboard": False} if address is None else {}
    try:
        if address is not None and address != "auto":
            _check_reachable(address)
        with handled():
            ray.init(address=address, log_to_driver=False, configure_logging=False, **local)
    except (OSError, AnyRayError, RuntimeError, ValueError) as error:
        raise CwdmError(f"no Ray cluster at {address or 'this machine'}: {_first_line(error)}") from error


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes; raises OSError or ValueError."""
    place = urlsplit(address if "//" in address else f"//{address}")
    with socket.create_connection((place.hostname or "", place.port or 10001), timeout=10):
        pass


class _RayGroup:
    """A `dispatch.WorkerGroup` of actors.

    Args:
        workers: how many at most; None for the cluster's own number.
        cases: how many at most.
        stopped_by: the number of the signal that ends the run, 0 before it comes.
    """

    most = 1
    """What an actor has done is known at the end of a call, and what it had not said yet would be done again."""

    def __init__(self, work: Work, workers: int | None, cases: int, stopped_by: Callable[[], int]) -> None:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
        self.on_gpus = work.device != "cpu" and gpus > 0
        if work.device == "cuda" and not gpus:
            raise SettingsError("a GPU was demanded (--device cuda), but the Ray cluster has none; use --device cpu")
        self.stopped_by = stopped_by
        self.work = replace(work, device="cuda" if self.on_gpus else "cpu")  # without its GPU none must go on
        cores = [int(machine.get("CPU", 0)) for machine in machines]
        default, most = (gpus, gpus) if self.on_gpus else (sum(max(1, n // 4) for n in cores if n), sum(cores))
        # Ray lets a worker for whom there is no place wait for ever.
        self.size = max(1, min(workers or default, most, cases))
        self.cores = 1 if self.on_gpus else cores_each(cores, self.size)
        self.actors: dict[int, Any] = {}
        self.calls: dict[Any, int] = {}
        self.received: deque[tuple[int, Message]] = deque()

    def start_worker(self, place: int) -> None:
        """A new worker; Ray finds it a machine."""
        needs = {"num_cpus": self.cores, "num_gpus": 1 if self.on_gpus else 0}
        environment = {"env_vars": {"OMP_NUM_THREADS": str(self.cores)}}
        self.actors[place] = ray.remote(_Worker).options(**needs, runtime_env=environment).remote(self.work)
        self.calls[self.actors[place].begin.remote()] = place

    def assign(self, place: int, tasks: list[Task]) -> None:
        self.calls[self.actors[place].run.remote(tasks)] = place

    def dismiss(self, place: int) -> None:
        del self.actors[place]  # and Ray has its place for one that waits

    def receive(self) -> tuple[int, Message]:
        while not self.received:
            done, _ = ray.wait(list(self.calls), num_returns=1, timeout=1)
            if self.stopped_by():
                raise SystemExit(128 + self.stopped_by())
            for call in done:
                place = self.calls.pop(call)
                self.received.extend((place, message) for message in self.messages(place, call))
        return self.received.popleft()

    def messages(self, place: int, call: Any) -> list[Message]:
        """What came of a call; a worker that is lost is let go of."""
        try:
            answer = ray.get(call)
        except LOST as error:
            answer = Lost(_first_line(error))
        except AnyRayError as error:
            answer = CwdmError(f"a worker failed: {_first_line(error)}")
        if isinstance(answer, Lost):
            ray.kill(self.actors.pop(place))
        return [*answer, IDLE] if isinstance(answer, list) else [answer]


def cores_each(machines: Sequence[int], workers: int) -> int:
    """The most cores that each of so many workers can have, none of them on two machines; 1 if there are too few."""
    fitting = (n for n in range(max(machines), 1, -1) if sum(cores // n for cores in machines) >= workers)
    return next(fitting, 1)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
