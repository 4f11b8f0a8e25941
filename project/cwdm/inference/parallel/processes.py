"""Workers on one machine, a GPU or a share of the cores each: processes that a function call starts."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from queue import SimpleQueue
from threading import Lock, Thread
from typing import NoReturn

import torch

from cwdm.device import choose_device
from cwdm.errors import CwdmError, DeviceLostError, SettingsError
from cwdm.images import CaseFolder
from cwdm.inference.cohort import Work
from cwdm.inference.outcome import Outcome
from cwdm.inference.parallel.dispatch import Lost, Message, serve, synthesise_among
from cwdm.inference.plan import Task
from cwdm.progress import CohortProgress

DEVICE_LOST = 4
"""Exit code of a process whose GPU no longer works."""

MOST_AT_ONCE = 8
"""Tasks that a worker is given together, so that reading, computing and writing overlap."""

PATIENCE_S = 20
"""How long a worker that was told to leave may take, and all of them together at the end of a run."""

Serve = Callable[[Iterator[list[Task]], Callable[[Message], None]], None]
"""What a worker does with the tasks that it is given, and a function that posts what comes of them."""

_CHILD = (
    "import sys; sys.path[:] = sys.argv[2:]; from cwdm.inference.parallel.processes import live; live(int(sys.argv[1]))"
)


def count_workers(devices: str, device: str) -> int:
    """Workers for "all" or a number: a GPU each, or on the CPU a share of its cores each.

    Raises:
        SettingsError: not such a number, or more than there are GPUs.
    """
    gpus = torch.cuda.device_count() if has_gpus(device) else 0
    if devices == "all":
        return max(gpus, 1)
    if not devices.isascii() or not devices.isdigit() or int(devices) < 1:
        raise SettingsError(f"--devices {devices}: give a number from 1, or all")
    if gpus and int(devices) > gpus:
        raise SettingsError(f"--devices {devices}: there are only {gpus} GPUs")
    return int(devices)


def has_gpus(device: str) -> bool:
    """Whether a choice of device ("auto", "cpu", "cuda") means the GPUs of this machine."""
    return device != "cpu" and torch.cuda.is_available()


def synthesise_on_workers(
    folders: Sequence[CaseFolder], work: Work, progress: CohortProgress, count: int
) -> list[Outcome]:
    """Like `cohort.synthesise_cohort`, in `count` processes, each with a GPU or a share of the cores."""
    gpus = choose_device(work.device).type == "cuda"
    work = replace(work, device="cuda" if gpus else "cpu")  # a worker whose GPU is gone must not go on without
    environments = [_environment(index, count, gpus) for index in range(count)]
    with ProcessGroup(partial(serve, work), environments, progress.log, MOST_AT_ONCE) as group:
        return synthesise_among(group, folders, work, progress)


def _environment(index: int, count: int, gpus: bool) -> dict[str, str]:
    if gpus:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        return {**os.environ, "CUDA_VISIBLE_DEVICES": seen.split(",")[index] if seen else str(index)}
    return {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}


class ProcessGroup:
    """A `dispatch.WorkerGroup` of processes of this machine; a context manager that leaves none behind.

    Args:
        serve: what each of them does; goes there by pickle.
        environments: their environment variables, one set a place.
        log: for what they say on standard error.
        most: tasks that a worker is given at once.
    """

    def __init__(
        self, serve: Serve, environments: Sequence[Mapping[str, str]], log: Callable[[str], None], most: int = 1
    ) -> None:
        self.size, self.most = len(environments), most
        self._serve, self._environments, self._log = serve, environments, log
        self._workers: dict[int, _Process] = {}
        self._leaving: list[_Process] = []

    def __enter__(self) -> "ProcessGroup":
        return self

    def __exit__(self, *fault: object) -> None:
        everyone = [*self._leaving, *self._workers.values()]
        for worker in everyone if any(fault) else ():
            worker.process.terminate()
        deadline = time.monotonic() + PATIENCE_S  # of all of them: their last moments pass at the same time
        for worker in everyone:
            worker.end(deadline)

    def start_worker(self, place: int) -> None:
        worker = self._workers[place] = _start(self._environments[place])
        worker.listen(lambda line: self._log(f"[{place}] {line}"))
        worker.send(self._serve)

    def assign(self, place: int, tasks: list[Task]) -> None:
        self._workers[place].send(tasks)

    def dismiss(self, place: int) -> None:
        worker = self._workers.pop(place)
        worker.send(None)
        self._leaving.append(worker)

    def receive(self) -> tuple[int, Message]:
        places = {worker.connection: place for place, worker in self._workers.items()}
        connection = wait(list(places))[0]
        assert isinstance(connection, Connection)
        place = places[connection]
        try:
            message: Message = connection.recv()
        except (EOFError, OSError):
            message = Lost(self._workers[place].end())
        else:
            if isinstance(message, Lost):
                self._workers[place].end()
        if isinstance(message, Lost):
            del self._workers[place]
        return place, message


@dataclass
class _Process:
    """A worker as its parent has it."""

    process: subprocess.Popen[str]
    connection: Connection
    listener: Thread | None = None

    def send(self, message: object) -> None:
        with suppress(OSError):  # it is gone, which whoever listens will hear
            self.connection.send(message)

    def listen(self, say: Callable[[str], None]) -> None:
        """Pass on what it says on standard error, line by line."""
        stream = self.process.stderr
        assert stream is not None

        def pass_on() -> None:
            with stream:
                for line in stream:
                    say(line.rstrip("\n"))

        self.listener = Thread(target=pass_on, daemon=True)
        self.listener.start()

    def end(self, deadline: float | None = None) -> str:
        """Wait until it is gone; returns how it went.

        Args:
            deadline: by the monotonic clock, when it is killed; None: in `PATIENCE_S`.
        """
        left = PATIENCE_S if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            code = self.process.wait(left)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.connection.close()
        if self.listener:
            self.listener.join(1)  # whatever it started itself may still hold the pipe
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _start(environment: Mapping[str, str]) -> _Process:
    ours, theirs = Pipe()
    # Modules come from where this process has them, never (-P) from the folder that it happens to be in.
    path = [entry for entry in sys.path if entry]
    command = [sys.executable, "-P", "-c", _CHILD, str(theirs.fileno()), *path]
    with theirs:
        process = subprocess.Popen(
            command,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # Ctrl-C reaches a whole process group; the workers hear of it from their parent
        )
    return _Process(process, ours)


# ------------------------------------------------------------------------------------------------ inside a worker


def live(descriptor: int) -> None:
    """The worker at the other end of a pipe: receives what to do, then tasks, until it is told that there are no more.

    It leaves at once when its parent is gone, in the middle of a case too.
    """
    connection, tasks = Connection(descriptor), SimpleQueue[list[Task] | None]()
    signal.signal(signal.SIGTERM, _leave)
    serve: Serve = connection.recv()
    Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    lock = Lock()

    def post(message: Message) -> None:
        with lock:
            connection.send(message)

    try:
        serve(iter(tasks.get, None), post)
    except DeviceLostError as error:
        post(Lost(str(error)))
        sys.stderr.flush()
        os._exit(DEVICE_LOST)  # a broken driver may fail or hang in what Python does at its end
    except CwdmError as error:
        post(error)


def _receive(connection: Connection, tasks: "SimpleQueue[list[Task] | None]") -> None:
    try:
        while batch := connection.recv():
            tasks.put(batch)
        tasks.put(None)
    except (EOFError, OSError):
        os._exit(1)


def _leave(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)
