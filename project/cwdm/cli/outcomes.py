"""The end of a run over many items: how many are done, which failed, and the exit code that says so."""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Protocol, TypeVar


class Ended(Protocol):
    """An item that has come to its end: `written`, `skipped` or, for a reason, `failed`."""

    @property
    def status(self) -> str: ...

    @property
    def reason(self) -> str: ...


Item = TypeVar("Item", bound=Ended)


def sum_up(
    outcomes: Sequence[Item],
    place: object,
    log: Callable[[str], None],
    things: str = "cases",
    again: str = "",
    name: Callable[[Item], str] = attrgetter("name"),
) -> int:
    """Say what became of all items, the failed ones by name.

    Args:
        place: where the others are.
        things: what they are, in the plural.
        again: how those from before are made again, if they can be.
        name: what an item is called.

    Returns:
        The exit code: 1 if an item failed, else 0.
    """
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    skipped = sum(outcome.status == "skipped" for outcome in outcomes)
    counts = [f"{len(outcomes) - len(failed)} of {len(outcomes)} {things} are in {place}"]
    counts += [f"{skipped} of them from before{f' ({again} makes them again)' if again else ''}"] if skipped else []
    counts += [f"{len(failed)} FAILED"] if failed else []
    log(", ".join(counts))
    for outcome in failed:
        log(f"  {name(outcome)}: {outcome.reason}")
    return 1 if failed else 0
