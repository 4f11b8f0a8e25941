"""Records in JSON of patients' scans, pictures included: one schema for who writes them and who reads them."""

import re
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import PlainValidator, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cwdm.files import matching, read_json, write_json

VERDICTS = ("failed", "reject", "review", "ok")
"""Worst first."""

ENDING = "-scan.json"

_URI = re.compile(r"data:image/webp;base64,[A-Za-z0-9+/]*={0,2}")


def _uri(value: object) -> str:
    if not isinstance(value, str) or not _URI.fullmatch(value):
        raise ValueError("is no picture")
    return value


def _text(value: object) -> str:
    """Any string: names of files may hold what is no Unicode."""
    if not isinstance(value, str):
        raise ValueError("is no text")
    return value


Text = Annotated[str, PlainValidator(_text)]


@dataclass(frozen=True)
class Tile:
    """A picture of so many pixels; `left` and `right` are the sides of the head that are seen there."""

    uri: Annotated[str, PlainValidator(_uri)]
    width: int
    height: int
    left: Text = ""
    right: Text = ""


@dataclass(frozen=True)
class Panel:
    """Pictures in rows and columns, each with a name."""

    title: Text
    columns: tuple[Text, ...]
    rows: tuple[Text, ...]
    tiles: tuple[tuple[Tile, ...], ...]


@dataclass(frozen=True, kw_only=True)
class ScanRecord:
    """What became of a patient's scans.

    Attributes:
        verdict: the graver one of the checks of registration and image, or `failed`.
        reasons: of the verdict.
        remarks: what else a person should know.
        inputs: modality -> the scan.
        masks: modality -> where its brain mask comes from.
        synthesised: modality -> that of the scan on whose grid it is.
        reference: modality that the others were registered to.
        metrics: of the check of the registrations.
        settings: what else decided the images.
    """

    program: Text = ""
    patient: Text
    verdict: Literal[VERDICTS]  # type: ignore[valid-type]
    reasons: tuple[Text, ...] = ()
    remarks: tuple[Text, ...] = ()
    inputs: Mapping[str, Text] = field(default_factory=dict)
    masks: Mapping[str, Text] = field(default_factory=dict)
    synthesised: Mapping[str, Text] = field(default_factory=dict)
    space: Text = ""
    reference: Text = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    weights: Text = ""
    settings: Mapping[str, Text] = field(default_factory=dict)
    panels: tuple[Panel, ...] = ()


_records = TypeAdapter(ScanRecord)


def write_scan_record(report: Path, record: ScanRecord) -> None:
    """Write REPORT/<patient>-scan.json; raises OutputError."""
    write_json(report / f"{record.patient}{ENDING}", asdict(record))


def read_scan_records(report: Path) -> tuple[list[ScanRecord], list[str]]:
    """The records of a folder, the worst first, and what is wrong with files that are none."""
    records, faults = [], []
    for path in matching(report, f"*{ENDING}"):
        try:
            records.append(_records.validate_python(read_json(path)))
        except (OSError, ValueError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            faults.append(f"{path.name} is no record of a patient's scans ({reason}); left out")
    records.sort(key=lambda record: (VERDICTS.index(record.verdict), record.patient))
    return records, faults
