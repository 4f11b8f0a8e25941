"""Warnings of finished images, which are kept though they would be made otherwise now."""

from collections.abc import Callable

from cwdm.inference.provenance import Provenance, describe, provenance
from cwdm.pipeline import Pipeline
from cwdm.settings import Settings


def changes(
    made: Provenance | None, today: Callable[[], Provenance], explain: Callable[[Exception], str]
) -> tuple[str, ...]:
    """A warning if a finished image was not made with today's weights and settings.

    Args:
        made: what its header says.
        today: what it would say now, which may fail, as weights may be missing or damaged.
        explain: an error in one line.
    """
    if made is None:
        return ("its header does not say what it was made with; --overwrite makes it again",)
    try:
        now = today()
    except Exception as error:
        return (f"cannot tell whether it was made with these weights: {explain(error)}",)
    if made.weights != now.weights:
        return (f"made with other weights ({made.weights}…, not {now.weights}…); --overwrite makes it again",)
    return () if made == now else ("made with other settings; --overwrite makes it again",)


def provenance_of(pipeline: Pipeline, settings: Settings, **others: str) -> Provenance:
    """The provenance of what these make.

    Args:
        others: what else decides a result beside the case itself.
    """
    return provenance({**describe(pipeline, settings), **others})
