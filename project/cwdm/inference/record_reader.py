"""The records that a report folder holds, also those of older versions."""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from cwdm.errors import InputError
from cwdm.files import read_json
from cwdm.inference.records import PROGRAM, CaseRecord, RunRecord

T = TypeVar("T")

_RUN_NAME = re.compile(r"run-\d{8}T\d{6}\.\d+-\d+\.json")


@dataclass(frozen=True)
class Records:
    """All that a report folder tells.

    Attributes:
        runs: in the order in which they began.
        faults: records that cannot be read, in plain words.
    """

    runs: tuple[RunRecord, ...]
    cases: tuple[CaseRecord, ...]
    faults: tuple[str, ...]


def read_records(report: Path) -> Records:
    """Read what `cwdm infer --report_path` wrote.

    Raises:
        InputError: the folder cannot be read, or holds no record.
    """
    try:
        paths = sorted(path for path in report.iterdir() if path.suffix == ".json" and path.name[0] != ".")
    except OSError as error:
        raise InputError(f"the report folder {report} cannot be read: {error.strerror}") from error
    faults: list[str] = []
    runs = list(_read_all(RunRecord, (path for path in paths if _RUN_NAME.fullmatch(path.name)), faults))
    cases = list(_read_all(CaseRecord, (path for path in paths if not _RUN_NAME.fullmatch(path.name)), faults))
    if not runs and not cases:
        told = f" ({faults[0]})" if faults else ""
        raise InputError(f"no record found in {report}{told}; fill it with 'cwdm infer --report_path {report}'")
    return Records(tuple(sorted(runs, key=lambda run: run.started)), tuple(cases), tuple(faults))


def check_record_replaceable(path: Path) -> None:
    """Refuse to replace a file that is there, but for an earlier record of a case.

    Raises:
        InputError: what is there is no record of a case.
    """
    with suppress(OSError, ValueError):  # ValidationError is a ValueError
        if _read(CaseRecord, path).program.startswith(PROGRAM.split()[0]):
            return
    raise InputError(f"{path} is there and is no record of cwdm's; move it away or choose another report folder")


def _read(kind: type[T], path: Path) -> T:
    """One record; raises OSError or ValueError (ValidationError too)."""
    # Names of files may hold bytes that are no text, which pydantic's own reader of JSON refuses.
    return TypeAdapter(kind).validate_python(read_json(path))


def _read_all(kind: type[T], paths: Iterable[Path], faults: list[str]) -> Iterator[T]:
    for path in paths:
        try:
            yield _read(kind, path)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(key) for key in fault["loc"])
            faults.append(f"{path.name} is not a record as cwdm writes it ({where}: {fault['msg']})")
        except (OSError, ValueError) as error:
            faults.append(f"{path.name} cannot be read ({error})")
