"""Records in JSON of runs and cases: one schema for who writes them and who reads them.

What is not known has a default, so that records of older versions can be read.
"""

import os
import time
from collections.abc import Iterable
from dataclasses import asdict, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from cwdm import __version__
from cwdm.files import write_json
from cwdm.inference.outcome import Modality, Outcome, Text

PROGRAM = f"cwdm {__version__}"


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
