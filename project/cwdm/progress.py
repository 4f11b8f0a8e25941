"""What a person sees of a long run: bars on a terminal, one plain line an event elsewhere."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class CohortProgress:
    """Two bars, cases and sampling steps, with log lines above them. A context manager.

    Args:
        total: number of cases.
        console: defaults to standard error, so that standard output stays clean.
    """

    def __init__(self, total: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self._cases = self._bars.add_task("cases", total=total)
        self._steps = self._bars.add_task("steps", total=None)

    def __enter__(self) -> "CohortProgress":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start_case(self, name: str, steps: int) -> None:
        """The network begins with a case."""
        self._bars.reset(self._steps, total=steps, description=name)

    def step(self) -> None:
        """One evaluation of the network is done."""
        self._bars.advance(self._steps)

    def end_case(self, line: str) -> None:
        """A case is written, skipped or has failed."""
        self.log(line)
        self._bars.advance(self._cases)

    def log(self, line: str) -> None:
        """Print a line above the bars, as it is."""
        self.console.print(line, markup=False, soft_wrap=True)
