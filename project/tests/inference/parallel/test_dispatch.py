"""How a cohort is dealt out, and what becomes of it when workers are lost; the product's workers: test_workers."""

import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwdm.errors import CwdmError, DeviceLostError, OutputError
from cwdm.images.cases import CaseFolder
from cwdm.inference.cohort import Work
from cwdm.inference.outcome import Outcome
from cwdm.inference.parallel import processes
from cwdm.inference.parallel.dispatch import ATTEMPTS, IDLE, STARTS, Lost, Message, synthesise_among
from cwdm.inference.parallel.processes import ProcessGroup
from cwdm.inference.plan import Task
from cwdm.progress import CohortProgress
from cwdm.settings import Settings


def folder(name: str, missing: str = "t1n") -> CaseFolder:
    others = {modality: Path(modality) for modality in ("t1n", "t1c", "t2w", "t2f") if modality != missing}
    return CaseFolder(name, Path(name), others)


def outcome(task: Task) -> Outcome:
    return Outcome(task.name, task.target, "written")


def dealt(group, folders: list[CaseFolder], output: Path) -> dict[str, Outcome]:
    """What became of each case."""
    work = Work("bundled", Settings(), "cpu", output, report=output / "report")
    outcomes = synthesise_among(group, folders, work, CohortProgress(len(folders)))
    assert len(outcomes) == len({each.case for each in outcomes})
    assert len(list((output / "report").glob("run-*.json"))) == 1
    return {each.case: each for each in outcomes}


class Here:
    """A group of workers without processes: its workers answer at once.

    Args:
        lost: asked, with a place and a task, whether the worker is lost over it; with None, before it has begun.
    """

    def __init__(self, size: int, most: int, lost: Callable[[int, Task | None], bool]) -> None:
        self.size, self.most, self.lost = size, most, lost
        self.said: deque[tuple[int, Message]] = deque()
        self.begun: Counter[str] = Counter()
        self.there: set[int] = set()
        self.starts: Counter[int] = Counter()

    def start_worker(self, place: int) -> None:
        assert place not in self.there
        self.starts[place] += 1
        gone = self.lost(place, None)
        self.said.append((place, Lost("broken") if gone else IDLE))
        if not gone:
            self.there.add(place)

    def assign(self, place: int, tasks: list[Task]) -> None:
        assert place in self.there
        assert len({task.target for task in tasks}) == 1
        for task in tasks:
            self.begun[task.name] += 1
            if self.lost(place, task):
                self.there.remove(place)
                self.said.append((place, Lost("killed by signal 11")))
                return
            self.said.append((place, outcome(task)))
        self.said.append((place, IDLE))

    def dismiss(self, place: int) -> None:
        self.there.remove(place)

    def receive(self) -> tuple[int, Message]:
        return self.said.popleft()


@given(st.integers(1, 4), st.integers(1, 8), st.lists(st.booleans(), max_size=40))
def test_only_the_cases_that_kill_fail(tmp_path_factory, size: int, most: int, kills: list[bool]) -> None:
    folders = [folder(f"{kill}-{number}", "t2f" if number % 3 else "t1n") for number, kill in enumerate(kills)]
    group = Here(size, most, lambda _, task: task is not None and task.name.startswith("True"))
    became = dealt(group, folders, tmp_path_factory.mktemp("output"))
    assert {name: each.status for name, each in became.items()} == {
        each.name: "failed" if each.name.startswith("True") else "written" for each in folders
    }
    assert all(group.begun[name] <= ATTEMPTS if name.startswith("True") else group.begun[name] == 1 for name in became)
    assert not group.there
    assert all("3 times" in each.reason for each in became.values() if each.status == "failed")


def test_a_broken_device_takes_no_case_along(tmp_path: Path) -> None:
    folders = [folder(str(number)) for number in range(9)]
    broken: set[int] = set()

    def lost(place: int, task: Task | None) -> bool:
        if place == 1 and task is not None:
            broken.add(place)
        return place in broken

    group = Here(2, 2, lost)
    assert {each.status for each in dealt(group, folders, tmp_path).values()} == {"written"}
    assert group.starts == {0: 1, 1: 1 + STARTS}


def test_no_worker_that_can_begin_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(CwdmError, match=r"no worker can be started \(broken\)"):
        dealt(Here(2, 1, lambda place, task: True), [folder("a")], tmp_path)


# ----------------------------------------------------------------------------------------------- real processes


def kill_over_b(batches: Iterator[list[Task]], post: Callable[[Message], None]) -> None:
    """A case that kills its worker."""
    post(IDLE)
    for batch in batches:
        for task in batch:
            if task.name == "b":
                os.kill(os.getpid(), signal.SIGSEGV)
            post(outcome(task))
        post(IDLE)


def break_on_first(batches: Iterator[list[Task]], post: Callable[[Message], None]) -> None:
    """A GPU, that of the first place, that stops working for good in the middle of a case."""
    mark = Path(os.environ["MARK"])
    if os.environ["PLACE"] == "0" and mark.exists():
        raise DeviceLostError("the GPU does not work")
    post(IDLE)
    for batch in batches:
        for task in batch:
            if os.environ["PLACE"] == "0":
                mark.touch()
                raise DeviceLostError("the GPU no longer works")
            post(outcome(task))
        post(IDLE)


def full_disk(batches: Iterator[list[Task]], post: Callable[[Message], None]) -> None:
    raise OutputError("the disk is full")


def wait_for_tasks(batches: Iterator[list[Task]], post: Callable[[Message], None]) -> None:
    post(IDLE)
    list(batches)


def test_a_case_that_kills_its_worker_fails_by_name_and_alone(tmp_path: Path) -> None:
    said: list[str] = []
    with ProcessGroup(kill_over_b, [dict(os.environ)] * 2, said.append) as group:
        became = dealt(group, [folder(name) for name in "abcde"], tmp_path)
    assert {name: each.status for name, each in became.items() if each.status != "written"} == {"b": "failed"}
    assert became["b"].reason == "its worker was lost (killed by signal 11), 3 times"


def test_the_case_of_a_broken_device_is_done_by_another(tmp_path: Path) -> None:
    environments = [{**os.environ, "MARK": str(tmp_path / "mark"), "PLACE": str(place)} for place in range(2)]
    with ProcessGroup(break_on_first, environments, lambda _: None) as group:
        became = dealt(group, [folder(name) for name in "abcde"], tmp_path / "output")
    assert {each.status for each in became.values()} == {"written"}


def test_what_no_worker_could_do_without_ends_the_run(tmp_path: Path) -> None:
    with ProcessGroup(full_disk, [dict(os.environ)], lambda _: None) as group, pytest.raises(OutputError, match="full"):
        dealt(group, [folder("a")], tmp_path)


def test_workers_that_do_not_leave_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE_S", 4)
    with suppress(OutputError), ProcessGroup(wait_for_tasks, [dict(os.environ)] * 2, lambda _: None) as group:
        for place in range(2):
            group.start_worker(place)
        assert {group.receive() for _ in range(2)} == {(place, IDLE) for place in range(2)}
        workers = psutil.Process().children()
        for worker in workers:
            worker.suspend()
        began = time.monotonic()
        raise OutputError("the disk is full")
    assert time.monotonic() - began < 7  # one by one they would take 8 s
    assert len(workers) == 2
    assert not any(worker.is_running() for worker in workers)
