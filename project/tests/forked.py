"""The `cwdm` command in a process of its own, forked from one that has imported the package and computed nothing.

Signals, exit code, standard error and memory are those of any process; the seconds in which PyTorch and Lightning are
imported pass once for all of them. What a start itself does is tested with `subprocess`.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["cwdm.cli.app", "cwdm.cli.infer", "cwdm.cli.train", "cwdm.training.loop", "cwdm.inference.cohort"]
)


class Forked:
    """A running command with the part of `subprocess.Popen` that tests use; what is left of it ends with a test run."""

    def __init__(self, command: multiprocessing.process.BaseProcess, stderr: int) -> None:
        self._command = command
        self.stderr = os.fdopen(stderr, encoding="utf-8")

    @property
    def pid(self) -> int:
        assert self._command.pid is not None
        return self._command.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, or minus the signal that ended it; None while it runs."""
        return self._command.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int | None:
        self._command.join(timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._command.kill()

    def communicate(self, timeout: float = 60) -> str:
        """What is left of standard error; a command that has not ended by then is killed."""
        limit = threading.Timer(timeout, self.kill)
        limit.start()
        try:
            said = self.stderr.read()
            self.wait()
        finally:
            limit.cancel()
        return said


def start(
    *words: str | Path,
    environment: Mapping[str, str] | None = None,
    heard: tuple[int, ...] = (),
    changes: Mapping[tuple[str, str], object] | None = None,
) -> Forked:
    """`cwdm` with these words, the leader of a session of its own.

    Args:
        environment: added to that of this process.
        heard: signals that may be ignored here, as in background jobs and under nohup, and are not to be there.
        changes: (module, name) -> its value there.
    """
    reader, writer = multiprocessing.Pipe(duplex=False)
    place = (str(Path.cwd()), {**os.environ, **(environment or {})})
    words_of_all = [str(word) for word in words]
    command = CONTEXT.Process(target=_run, args=(writer, words_of_all, place, heard, dict(changes or {})), daemon=False)
    command.start()
    writer.close()
    stderr = os.dup(reader.fileno())
    reader.close()
    return Forked(command, stderr)


def _run(
    stderr: Connection,
    words: list[str],
    place: tuple[str, dict[str, str]],
    heard: tuple[int, ...],
    changes: dict[tuple[str, str], object],
) -> None:
    os.setsid()
    os.dup2(stderr.fileno(), 2)
    stderr.close()
    # The streams of the process that was forked are of another kind: files, where this one has a pipe.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    folder, environment = place
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number in heard:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for (module, name), value in changes.items():
        setattr(import_module(module), name, value)
    from cwdm.cli.app import main

    sys.argv = ["cwdm", *words]
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # as an interpreter does at its end; multiprocessing does not
