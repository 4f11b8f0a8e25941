"""Signals that stop a run: caught for the length of a block, and put back behind it."""

import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)

Handler = Callable[[int, FrameType | None], object]


@contextmanager
def handled(handler: Handler | None = None, signals: Collection[signal.Signals] = STOPPING) -> Iterator[None]:
    """SIGINT and SIGTERM, or other signals, go to `handler` inside the block, and behind it to whoever had them before.

    A signal that is ignored stays ignored: that is how a shell starts a script's background jobs.

    Args:
        handler: None leaves the signals where they are, for a block of foreign code that takes them for itself.
    """
    # None stands for a handler that was not set from Python and could not be put back.
    before = {n: old for n in signals if (old := signal.getsignal(n)) not in (signal.SIG_IGN, None)}
    for number in before if handler else ():
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Signals wait until the block has ended, however it ends: for foreign code that makes something else of them.

    Yields:
        A function that gives the number of the signal that waits, or 0; the block should then come to its end.
    """
    waiting: list[int] = []
    try:
        with handled(lambda number, _: waiting.append(number)):
            yield lambda: waiting[0] if waiting else 0
    finally:
        if waiting:
            signal.raise_signal(waiting[0])
