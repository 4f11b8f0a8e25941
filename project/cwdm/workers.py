"""Several workers on one machine, a GPU or a share of the cores each: processes of `cwdm infer --shard`.

A worker that is killed is started again and does what is left of its share; finished cases are skipped, so none is
computed twice and none is lost.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from cwdm.errors import SettingsError

STARTS = 3
"""Of a worker that is killed; whatever kills it again and again (memory, a fault of the driver) is not chance."""


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


def run_workers(arguments: Sequence[str], count: int, place: tuple[int, int], gpus: bool) -> int:
    """Run `cwdm infer` with the arguments in `count` processes and pass on what they say.

    Args:
        arguments: of `cwdm infer`, without --devices and --shard.
        place: i and n of the share of the cases that all of them do together.
        gpus: worker i sees GPU i alone.

    Returns:
        The exit code: that of the worker to which most happened, 2 before 1 before 0.
    """
    index, of = place
    crew = _Crew()
    workers = [
        _Worker([*arguments, f"--shard={index + of * i}/{of * count}"], i, _environment(i, count, gpus), crew)
        for i in range(count)
    ]
    before = {number: signal.signal(number, crew.stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with ThreadPoolExecutor(count) as pool:
            return max(pool.map(_Worker.run, workers))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment(index: int, count: int, gpus: bool) -> dict[str, str]:
    if gpus:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        return {**os.environ, "CUDA_VISIBLE_DEVICES": seen.split(",")[index] if seen else str(index)}
    return {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}


@dataclass
class _Crew:
    """The processes that are running, and whether they were told to stop."""

    running: list[subprocess.Popen[str]] = field(default_factory=list)
    stopped_by: int = 0

    def stop(self, number: int, _: object) -> None:
        self.stopped_by = number
        for process in self.running:
            process.send_signal(signal.SIGTERM)


@dataclass
class _Worker:
    arguments: list[str]
    index: int
    environment: dict[str, str]
    crew: _Crew

    def run(self) -> int:
        """Run to the end, again if it is killed; returns its exit code."""
        for start in range(1, STARTS + 1):
            code = self._once()
            if self.crew.stopped_by:
                return 128 + self.crew.stopped_by
            if code >= 0:
                return code
            again = "starting it again" if start < STARTS else "giving up"
            self._say(f"killed by signal {-code}; {again}")
        return 2

    def _once(self) -> int:
        command = [sys.executable, "-m", "cwdm", "infer", *self.arguments]
        # Ctrl-C reaches a whole process group; the workers hear of it from their parent, once.
        process = subprocess.Popen(
            command, env=self.environment, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        )
        self.crew.running.append(process)
        if self.crew.stopped_by:  # the signal came before the process was on the list
            process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        for line in process.stderr:
            self._say(line.rstrip("\n"))
        code = process.wait()
        self.crew.running.remove(process)
        return code

    def _say(self, line: str) -> None:
        print(f"[{self.index}] {line}", file=sys.stderr, flush=True)
