"""The end of a run over many items: how many are done, which failed, and the exit code that says so."""

from collections.abc import Callable, Sequence

from cwdm.runner import Outcome


def sum_up(
    outcomes: Sequence[Outcome],
    place: object,
    log: Callable[[str], None],
    things: str = "cases",
    again: str = "",
) -> int:
    """Say what became of all items, the failed ones by name.

    Args:
        place: where the others are.
        things: what they are, in the plural.
        again: how those from before are made again, if they can be.

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
        log(f"  {outcome.name}: {outcome.reason}")
    return 1 if failed else 0
