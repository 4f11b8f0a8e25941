"""A table that says which image is which, where their names and headers leave it open or say something wrong."""

import csv
import fnmatch
from dataclasses import dataclass
from pathlib import Path

from cwdm.errors import InputError
from cwdm.files import open_file
from cwdm.images import MODALITIES

SKIP = "skip"
_COLUMNS = ("patient", "scan", "modality")
_MOST_BYTES = 16 << 20


@dataclass(frozen=True)
class Row:
    """A line of the table; patient and scan are patterns, in which * stands for anything and case does not matter."""

    line: int
    patient: str
    scan: str
    modality: str

    def is_about(self, patient: str) -> bool:
        """Whether the row is about a patient."""
        return self.patient in ("", patient) or fnmatch.fnmatchcase(patient.casefold(), self.patient.casefold())


@dataclass(frozen=True)
class ModalityTable:
    """Rows of the table; of those that match an image, the first one holds."""

    path: Path | None = None
    rows: tuple[Row, ...] = ()

    def rows_of(self, patient: str) -> list[Row]:
        """The rows about a patient."""
        return [row for row in self.rows if row.is_about(patient)]


def match(rows: list[Row], names: tuple[str, ...]) -> Row | None:
    """The first row about an image that goes by these names."""
    folded = [name.casefold() for name in names if name]

    def fits(row: Row) -> bool:
        pattern = row.scan.casefold()
        return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in folded)

    return next(filter(fits, rows), None)


def read_table(path: Path) -> ModalityTable:
    """A table with the columns patient (may be empty or missing: all of them), scan and modality.

    A scan is a path below the patient's folder or a file's name, or a DICOM series' number, description or
    SeriesInstanceUID. A modality is t1n, t1c, t2w, t2f or skip. Columns are separated by commas, semicolons or tabs.

    Raises:
        InputError: it cannot be read, or says something else.
    """
    try:
        with open_file(path) as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise InputError(f"{path} is larger than {_MOST_BYTES >> 20} MiB; is it the table of modalities?")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"the table {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the table {path} is no text in UTF-8; save it as CSV in UTF-8") from error
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    try:
        lines = list(csv.reader(text.splitlines(), delimiter=separator, strict=True))
    except csv.Error as error:
        raise InputError(f"the table {path} is no sound CSV ({error})") from error
    columns = [name.strip().lower() for name in lines[0]] if lines else []
    if not {"scan", "modality"} <= set(columns) <= set(_COLUMNS):
        raise InputError(f"{path}: expected the columns {', '.join(_COLUMNS)}, found {', '.join(columns) or 'nothing'}")
    rows = [_row(path, number, columns, line) for number, line in enumerate(lines[1:], 2) if any(line)]
    return ModalityTable(path, tuple(rows))


def _row(path: Path, number: int, columns: list[str], line: list[str]) -> Row:
    if len(line) != len(columns):
        raise InputError(f"{path}, line {number}: expected {len(columns)} columns, found {len(line)}")
    values = dict(zip(columns, (value.strip() for value in line), strict=True))
    modality = values["modality"].lower()
    if modality not in (*MODALITIES, SKIP):
        known = ", ".join((*MODALITIES, SKIP))
        raise InputError(f"{path}, line {number}: unknown modality {values['modality']!r}; one of {known}")
    if not values["scan"]:
        raise InputError(f"{path}, line {number}: the scan is empty; give its file name or series (* for any)")
    return Row(number, values.get("patient", ""), values["scan"], modality)
