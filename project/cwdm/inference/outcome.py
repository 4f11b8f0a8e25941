"""What became of a case, and what the automatic check says of its image."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import PlainValidator
from pydantic.dataclasses import dataclass

from cwdm.images import MODALITIES
from cwdm.progress import with_notes

Verdict = Literal["ok", "look", "reject"]

VERDICTS: tuple[Verdict, ...] = ("reject", "look", "ok")
"""Worst first."""


def _text(value: object) -> str:
    """Any string: names of files may hold what is no Unicode."""
    if not isinstance(value, str):
        raise ValueError("is no text")
    return value


def _file_name(value: object) -> str:
    name = _text(value)
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError("is not the name of a folder")
    return name


Text = Annotated[str, PlainValidator(_text)]
Modality = Literal[MODALITIES]  # type: ignore[valid-type]


@dataclass(frozen=True)
class Quality:
    """What the automatic check of an output found.

    Attributes:
        reasons: why it is not `ok`, the gravest first, in plain words.
        figures: what was measured, by name; what could not be measured is left out.
    """

    verdict: Verdict
    reasons: tuple[str, ...] = ()
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        modality: what was missing; empty where that could not be told.
        reason: why it failed.
        seconds: time spent sampling.
        quality: what the automatic check says of an output written in this run.
    """

    case: Annotated[str, PlainValidator(_file_name)]
    modality: Modality | Literal[""]
    status: Literal["written", "skipped", "failed"]
    reason: Text = ""
    seconds: float = 0.0
    warnings: tuple[Text, ...] = ()
    quality: Quality | None = None

    @property
    def line(self) -> str:
        """What a person is told."""
        name = f"{self.case}: {self.modality}" if self.modality else self.case
        if self.status == "failed":
            return with_notes(f"{name} FAILED: {self.reason}")
        how = f"written after {self.seconds:.1f} s of sampling" if self.status == "written" else "is there already"
        found = [f"{self.quality.verdict}: {reason}" for reason in self.quality.reasons] if self.quality else []
        return with_notes(f"{name} {how}", *(f"warning: {warning}" for warning in self.warnings), *found)
