"""Many items, one after the other: finished ones are skipped, a bad one is passed over, each with its reason."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from cwdm.errors import CaseError, InputError
from cwdm.progress import with_notes

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What became of an item.

    Attributes:
        name: the item's.
        status: `written`, `skipped` (finished before) or `failed`.
        reason: why it failed, in one line.
        warnings: what its user should know.
    """

    name: str
    status: Literal["written", "skipped", "failed"]
    reason: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """What a person is told."""
        if self.status == "failed":
            return with_notes(f"{self.name} FAILED: {self.reason}")
        told = {"written": "written", "skipped": "is there already"}[self.status]
        return with_notes(f"{self.name} {told}", *(f"warning: {warning}" for warning in self.warnings))


def run_each(
    items: Iterable[T],
    work: Callable[[T], tuple[str, ...] | None],
    *,
    name: Callable[[T], str],
    is_finished: Callable[[T], bool] = lambda item: False,
    changes: Callable[[T], tuple[str, ...]] = lambda item: (),
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Do the work of every item that is not finished.

    Args:
        work: makes an item and leaves it whole or not at all; returns warnings, if there are any.
        is_finished: fails an item, as `work` does, by CaseError or InputError.
        changes: warnings of an item that is finished, as of what has changed since.
        on_outcome: told about each item as it comes to its end.

    Raises:
        OutputError: nothing more can be written, so going on is pointless; what is written stays.
    """
    outcomes = []
    for item in items:
        outcome = _run_one(item, work, name(item), is_finished, changes)
        outcomes.append(outcome)
        on_outcome(outcome)
    return outcomes


def _run_one(
    item: T,
    work: Callable[[T], tuple[str, ...] | None],
    name: str,
    is_finished: Callable[[T], bool],
    changes: Callable[[T], tuple[str, ...]],
) -> Outcome:
    try:
        if is_finished(item):
            return Outcome(name, "skipped", warnings=changes(item))
        return Outcome(name, "written", warnings=work(item) or ())
    except CaseError as error:
        return Outcome(name, "failed", error.reason)
    except InputError as error:
        return Outcome(name, "failed", str(error))
