"""What a person sees: lines, and of a long run bars on a terminal, one plain line an event elsewhere."""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cwdm.errors import OutputError

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 60
"""Where there is no terminal to show a bar."""


def printable(text: str, lines: bool = False) -> str:
    """Text for a terminal or a log: a name may hold sequences that take a terminal over, and lines that nobody said.

    Args:
        lines: whether it may be several; then names in it are printable already.
    """
    return "".join(c if c.isprintable() or (lines and c == "\n") else ascii(c)[1:-1] for c in text)


def with_notes(line: str, *notes: str) -> str:
    """A line about an item and others below it, further in; each is printable."""
    return "\n    ".join(map(printable, (line, *notes)))


class _Lasting(Console):
    """A console whose reader may go while the run goes on, as that of `2>&1 >/dev/null | head -1` does."""

    def on_broken_pipe(self) -> None:
        _abandon(self.file)

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        except OSError as fault:  # a full disk, a terminal that is gone
            if not self.stderr:
                raise _unwritten(fault) from fault
            _abandon(self.file)


def _abandon(stream: IO[str]) -> None:
    """Let what a stream still holds, and what is written to it from now on, go nowhere."""
    with suppress(OSError, ValueError):  # it has no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _unwritten(error: OSError) -> OutputError:
    return OutputError(f"cannot write to standard output: {error.strerror}")


def to_stderr() -> Console:
    """Standard output stays clean."""
    return _Lasting(stderr=True, highlight=False)


def print_line(*lines: object) -> None:
    """A result, on standard output; raises OutputError where that is full."""
    try:
        print(*(printable(str(line)) for line in lines), sep="\n", flush=True)
    except BrokenPipeError:
        _abandon(sys.stdout)
    except OSError as error:
        raise _unwritten(error) from error


def print_table(table: "Table") -> None:
    """A result, on standard output; raises OutputError where that is full."""
    _Lasting().print(table)


def print_notice(*lines: object) -> None:
    """What is not a result, on standard error."""
    to_stderr().print("\n".join(printable(str(line)) for line in lines), markup=False, soft_wrap=True)


def print_error(first: object, *lines: object) -> None:
    """What went wrong, on standard error."""
    print_notice(f"error: {first}", *lines)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=bool(record.exc_info))  # a traceback has several


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
        self._bars.reset(self._steps, total=steps, description=printable(name))

    def step(self) -> None:
        """One evaluation of the network is done."""
        self._bars.advance(self._steps)
        self._done += 1
        if not self.console.is_terminal and time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self.log(f"{self._name}: step {self._done} of {self._total}")

    def end_case(self, line: str) -> None:
        """A case is written, skipped or has failed; see `with_notes`."""
        self.log(line, lines=True)
        self._bars.advance(self._cases)

    def log(self, line: str, lines: bool = False) -> None:
        """Print a line above the bars; `lines` as for `printable`."""
        self.console.print(printable(line, lines), markup=False, soft_wrap=True)
