"""Warnings of finished patients, which are kept though something else is asked for now."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cwdm.files import files_below
from cwdm.images import MARK, read_description
from cwdm.inference import Provenance, changes, read_provenance
from cwdm.scans.written import PREPARED

_MODALITY = re.compile(rf"{MARK} \S+ \((\w+)\)")
_SPACE = re.compile(rf"{PREPARED} \S+ \(\w+, (\w+)\)")


def changes_of_synthetic(
    place: Path, today: Callable[[str], Provenance], explain: Callable[[Exception], str]
) -> tuple[str, ...]:
    """Warnings if a patient's images were not made with what is asked for now.

    Args:
        place: the patient's folder.
        today: of a modality, with what an image would be made.
        explain: an error in one line.
    """
    return tuple(
        f"{modality}: {warning}"
        for modality, image in _with(_MODALITY, place).items()
        for warning in changes(read_provenance(image), partial(today, modality), explain)
    )


def changes_of_case(place: Path, space: str) -> tuple[str, ...]:
    """A warning if a patient's case folder was prepared in another space."""
    others = sorted(_with(_SPACE, place).keys() - {space})
    return tuple(f"prepared in the space {other}, not {space}; --overwrite makes it again" for other in others)


def _with(pattern: re.Pattern[str], place: Path) -> dict[str, Path]:
    """What the headers of images say -> the first image that says so."""
    found: dict[str, Path] = {}
    for path in files_below(place):
        if path.name.endswith(".nii.gz") and (match := pattern.match(read_description(path))):
            found.setdefault(match[1], path)
    return found
