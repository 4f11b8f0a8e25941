"""Records in JSON of runs and cases: one schema for who writes them and who reads them.

What is not known has a default, so that records of older versions can be read.
"""

import os
import time
from collections.abc import Iterable
from dataclasses import asdict, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import PlainValidator
from pydantic.dataclasses import dataclass

from cwdm import __version__
from cwdm.files import write_json
from cwdm.images import MODALITIES
from cwdm.progress import with_notes

PROGRAM = f"cwdm {__version__}"

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


@dataclass(frozen=True)
class WeightsOfCase:
    """The file, and its checksum."""

    file: Text = ""
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class _Synthesised:
    program: str = ""
    synthesised: bool = True


@dataclass(frozen=True)
class CaseRecord(Outcome, _Synthesised):
    """How an image came about: its outcome and what `describe` says.

    Attributes:
        input, output: folder of the case, and the image.
        given: the modalities that it was made from.
        weights_record: what the file of weights says about itself.
        device: model of the GPU, or "cpu".
        settings: of the run; see `cwdm.settings.Settings`.
    """

    input: Text = ""
    output: Text = ""
    given: tuple[Modality, ...] = ()
    weights: WeightsOfCase = field(default_factory=WeightsOfCase)
    weights_record: dict[str, Any] = field(default_factory=dict)
    sampler: str = ""
    timesteps: tuple[int, ...] = ()
    device: str = ""
    precision: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run did.

    Attributes:
        started: ISO 8601, UTC.
        seconds: from then to the end.
        settings: see `cwdm.settings.Settings`.
    """

    program: str = ""
    started: str
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    cases: tuple[Outcome, ...] = ()


def error_map_paths(report: Path, case: str, modality: str) -> tuple[Path, Path]:
    """Where the standard deviation over the samples stands, and where the one that is predicted in one pass."""
    return report / f"{case}-{modality}-spread.nii.gz", report / f"{case}-{modality}-std.nii.gz"


def case_record_path(report: Path, case: str, modality: str) -> Path:
    """Where the record of a case stands."""
    return report / f"{case}-{modality}.json"


def write_case_record(report: Path, record: CaseRecord) -> None:
    """Write REPORT/<case>-<modality>.json; raises OutputError."""
    write_json(case_record_path(report, record.case, record.modality), asdict(record))


def write_run_record(report: Path, started: float, settings: dict[str, Any], outcomes: Iterable[Outcome]) -> None:
    """Write what a run did, under a name of its own, so that the next run's does not replace it; raises OutputError.

    Args:
        started: seconds since 1970.
    """
    moment = datetime.fromtimestamp(started, UTC)
    record = RunRecord(
        program=PROGRAM,
        started=moment.isoformat(timespec="seconds"),
        seconds=round(time.time() - started, 3),
        settings=settings,
        cases=tuple(outcomes),
    )
    write_json(report / f"run-{moment:%Y%m%dT%H%M%S.%f}-{os.getpid()}.json", asdict(record))
