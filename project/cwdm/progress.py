"""What a person sees: lines, and of a long run bars on a terminal, one plain line an event elsewhere."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 60
"""Where there is no terminal to show a bar."""


def printable(text: str, lines: bool = True) -> str:
    """Text for a terminal: a folder's name may hold anything, even sequences that would take the terminal over.

    Args:
        lines: whether it may be several.
    """
    return "".join(c if c.isprintable() or (lines and c == "\n") else ascii(c)[1:-1] for c in text)


def to_stderr() -> Console:
    """Standard output stays clean."""
    return Console(stderr=True, highlight=False)


def print_line(line: object) -> None:
    """A result, on standard output."""
    print(printable(str(line)))


def print_notice(line: object) -> None:
    """What is not a result, on standard error."""
    to_stderr().print(printable(str(line)), markup=False, soft_wrap=True)


def print_error(message: object) -> None:
    """What went wrong, on standard error."""
    print_notice(f"error: {message}")


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def make_logs_printable() -> None:
    """Warnings in the log of a program that sets up none, as lines for a terminal."""
    if logging.lastResort:
        logging.lastResort.setFormatter(_Printable())


def bars(console: Console | None = None, shown: bool = True) -> Progress:
    """Bars with counts and times, which vanish when they are done; none where there is no terminal."""
    console = console or to_stderr()
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
        transient=True,
    )


def tracked(results: Iterable[T], total: int, what: str, shown: bool = True) -> Iterator[T]:
    """Results as they come: a bar on a terminal, elsewhere a line a minute that says how long it will take."""
    console = to_stderr()
    start = said = time.monotonic()
    with bars(console, shown) as bar:
        for done, result in enumerate(bar.track(results, total, description=what), start=1):
            yield result
            now = time.monotonic()
            if shown and not console.is_terminal and now - said > SECONDS_BETWEEN_LINES:
                said = now
                left_min = (now - start) / done * (total - done) / 60
                console.print(f"{what}: {done} of {total}, {left_min:.0f} min to go", soft_wrap=True)


class CohortProgress:
    """Two bars, cases and sampling steps, with log lines above them. A context manager.

    Args:
        total: number of cases.
        console: defaults to standard error.
    """

    def __init__(self, total: int, console: Console | None = None) -> None:
        self.console = console or to_stderr()
        self._bars = bars(self.console)
        self._cases = self._bars.add_task("cases", total=total)
        self._steps = self._bars.add_task("steps", total=None)
        self._name, self._done, self._total, self._said = "", 0, 0, time.monotonic()

    def expect(self, total: int) -> None:
        """So many volumes are to be made."""
        self._bars.update(self._cases, total=total)

    def __enter__(self) -> "CohortProgress":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start_case(self, name: str, steps: int) -> None:
        """The network begins with a case."""
        self._name, self._done, self._total, self._said = name, 0, steps, time.monotonic()
        self._bars.reset(self._steps, total=steps, description=printable(name, lines=False))

    def step(self) -> None:
        """One evaluation of the network is done."""
        self._bars.advance(self._steps)
        self._done += 1
        if not self.console.is_terminal and time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self.log(f"{self._name}: step {self._done} of {self._total}")

    def end_case(self, line: str) -> None:
        """A case is written, skipped or has failed."""
        self.log(line)
        self._bars.advance(self._cases)

    def log(self, line: str) -> None:
        """Print a line above the bars, as it is."""
        self.console.print(printable(line), markup=False, soft_wrap=True)
