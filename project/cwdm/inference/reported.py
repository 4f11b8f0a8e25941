"""What a case leaves in the report folder: its record, and the standard deviation."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cwdm.files import output_errors
from cwdm.images import MARK, is_made, write_volume
from cwdm.inference.outcome import Outcome
from cwdm.inference.records import PROGRAM, CaseRecord, case_record_path, error_map_paths, write_case_record
from cwdm.inference.steps import Synthesis


def check_report_replaceable(report: Path, case: str, modality: str) -> None:
    """Refuse a report folder where what a case writes there would replace or delete something of somebody else's.

    Raises:
        InputError: it would.
    """
    record = case_record_path(report, case, modality)
    if os.path.lexists(record):  # not where the name is too long, which whoever writes there will say
        from cwdm.inference.record_reader import check_record_replaceable  # most runs have no use for it

        check_record_replaceable(record)
    for path in error_map_paths(report, case, modality):
        is_made(path, MARK)


def write_report(
    report: Path, outcome: Outcome, folder: Path, image: Path, result: Synthesis, described: dict[str, Any]
) -> None:
    """Write the record of a case and its standard deviation, ahead of the image.

    Args:
        folder: the case's.
        described: see `cwdm.inference.describe`.

    Raises:
        OutputError: they cannot be written.
    """
    places = {"input": str(folder.absolute()), "output": str(image.absolute())}
    told = {**asdict(outcome), **places, "given": tuple(result.case.volumes), **described}
    write_case_record(report, CaseRecord(program=PROGRAM, **told))
    for path, predicted in zip(error_map_paths(report, outcome.case, outcome.modality), (False, True), strict=True):
        if result.std is not None and predicted == result.predicted:
            write_volume(path, result.std, result.case, native=False)
            continue
        with output_errors(path.parent):  # that of an earlier run says nothing about this image
            path.unlink(missing_ok=True)
