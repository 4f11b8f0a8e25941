"""A cohort among several workers: each gets more when it has done what it has, and a lost one is replaced.

What the workers are is the group's business: processes of this machine (`processes`) or actors of a Ray cluster
(`ray_workers`).
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

import torch

from cwdm.errors import CwdmError, DeviceLostError
from cwdm.images import CaseFolder
from cwdm.inference.cohort import Runner, Work, cohort_run, device_works
from cwdm.inference.outcome import Outcome
from cwdm.inference.plan import Task, plan_tasks
from cwdm.inference.synthesizer import Synthesizer
from cwdm.precision import warn_of_precision
from cwdm.progress import CohortProgress
from cwdm.weights import folder_of

ATTEMPTS = 3
"""Workers that may be lost over one case before it counts as failed: it may be the one that kills them."""

STARTS = 3
"""Workers that may be lost in one place, one after the other, before they have begun: no more are started there."""


class Idle(Enum):
    """A worker's word that it can begin, or has done all that it was given."""

    IDLE = auto()


IDLE = Idle.IDLE


@dataclass(frozen=True)
class Lost:
    """A worker that is gone; `reason` continues "its worker was lost"."""

    reason: str


Message = Idle | Outcome | CwdmError | Lost
"""What comes from a worker: an error is one that no other worker could do without either (weights, output)."""


class WorkerGroup(Protocol):
    """Places for workers, numbered from 0.

    Attributes:
        size: how many places.
        most: tasks that a worker is given at once.
    """

    size: int
    most: int

    def start_worker(self, place: int) -> None:
        """A new worker, which says that it is idle as soon as it can begin."""

    def assign(self, place: int, tasks: list[Task]) -> None:
        """Tasks of one modality for an idle worker, which answers with an outcome for each and is then idle again."""

    def dismiss(self, place: int) -> None:
        """Nothing more for an idle worker."""

    def receive(self) -> tuple[int, Message]:
        """The next message of any worker, waited for."""


def synthesise_among(
    group: WorkerGroup, folders: Sequence[CaseFolder], work: Work, progress: CohortProgress
) -> list[Outcome]:
    """Like `cohort.synthesise_cohort`, with the computing done by a group of workers.

    Raises:
        CwdmError: no worker can use the weights or the device, or can be started.
        OutputError: an output folder cannot be written or is full.
    """
    tasks = plan_tasks(folders, folder_of(work.weights))
    with cohort_run(len(tasks), work.output, work.report, work.settings, progress) as tally:
        _Dispatcher(group, tasks, tally.end, progress.log).run()
    return tally.outcomes


class _Dispatcher:
    """The tasks that wait, and those that each worker has."""

    def __init__(
        self, group: WorkerGroup, tasks: Iterable[Task], end: Callable[[Outcome], None], log: Callable[[str], None]
    ) -> None:
        self.group, self.end, self.log = group, end, log
        # Tasks of one modality follow each other, so that a worker seldom loads other weights.
        self.waiting = deque(sorted(tasks, key=lambda task: (task.target, task.name)))
        self.given: dict[int, list[Task]] = {}
        self.losses: Counter[tuple[str, str]] = Counter()
        self.false_starts: Counter[int] = Counter()

    def run(self) -> None:
        self.fill_places("")
        while self.given:
            place, message = self.group.receive()
            if isinstance(message, Outcome):
                self.settle(place, message)
            elif isinstance(message, Idle):
                self.feed(place)
            elif isinstance(message, Lost):
                self.replace(place, message.reason)
            else:
                raise message

    def fill_places(self, reason: str) -> None:
        """A worker for each task that waits, where there is a free place in which one can be started."""
        usable = [place for place in range(self.group.size) if self.false_starts[place] < STARTS]
        free = [place for place in usable if place not in self.given]
        for place in free[: len(self.waiting)]:
            self.group.start_worker(place)
            self.given[place] = []
        if self.waiting and not self.given:
            raise CwdmError(f"no worker can be started ({reason})")

    def settle(self, place: int, outcome: Outcome) -> None:
        self.given[place] = [task for task in self.given[place] if _name(task) != (outcome.case, outcome.modality)]
        self.end(outcome)

    def feed(self, place: int) -> None:
        assert not self.given[place], "a task without an outcome"
        self.false_starts.pop(place, None)
        if self.waiting:
            self.given[place] = self.next_tasks()
            self.group.assign(place, list(self.given[place]))
        else:
            del self.given[place]
            self.group.dismiss(place)

    def next_tasks(self) -> list[Task]:
        """Several of one modality, fewer towards the end; alone, a task over which a worker was lost."""
        tasks = [self.waiting.popleft()]
        most = min(self.group.most, len(self.waiting) // (2 * self.group.size))
        while len(tasks) < most and not self.losses[_name(tasks[0])]:
            following = self.waiting[0]
            if following.target != tasks[0].target or self.losses[_name(following)]:
                break
            tasks.append(self.waiting.popleft())
        return tasks

    def replace(self, place: int, reason: str) -> None:
        """A worker is lost: back to the others with what it had, unless that was too often."""
        tasks = self.given.pop(place)
        self.false_starts[place] += not tasks
        self.log(f"worker {place} was lost ({reason}); {_what_now(tasks)}")
        for task in reversed(tasks):
            self.losses[_name(task)] += 1
            if self.losses[_name(task)] < ATTEMPTS:
                self.waiting.appendleft(task)
            else:
                lost = f"its worker was lost ({reason}), {ATTEMPTS} times"
                self.end(Outcome(task.name, task.target, "failed", lost))
        self.fill_places(reason)


def _name(task: Task) -> tuple[str, str]:
    return task.name, task.target


def _what_now(tasks: Sequence[Task]) -> str:
    return f"back to the others with {', '.join(task.name for task in tasks)}" if tasks else "it had not begun"


# ------------------------------------------------------------------------------------------------ inside a worker


def serve(work: Work, batches: Iterator[list[Task]], post: Callable[[Message], None]) -> None:
    """A worker's life: what it is given to its end, and everything that comes of it posted.

    Raises:
        DeviceLostError: the device does not work, or no longer.
        CwdmError: something that no other worker could do without either.
    """
    progress = CohortProgress(0)
    synthesizer = start_synthesizer(work)
    progress.log(synthesizer.summary())
    warn_of_precision(synthesizer.dtype, synthesizer.device, progress.log)
    post(IDLE)
    for batch in batches:
        Runner(synthesizer, work.output, work.report, work.overwrite, progress, post).run(batch)
        post(IDLE)


def start_synthesizer(work: Work) -> Synthesizer:
    """The synthesizer of a worker; raises DeviceLostError where the GPU that it should have does not work."""
    if work.device == "cuda" and not device_works(torch.device("cuda")):
        raise DeviceLostError("the GPU does not work; a tiny computation on it fails")
    return Synthesizer(work.weights, work.settings, work.device)
