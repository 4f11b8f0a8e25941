"""The page about patients' scans: how they were registered, and what was synthesised."""

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cwdm.errors import InputError
from cwdm.files import write_atomically
from cwdm.report.html import GENERATOR, check_replaceable, environment_for, packaged, security_policy, write_page
from cwdm.report.scan_records import VERDICTS, ScanRecord, read_scan_records

FILE_NAME = "report.html"

MOST_PATIENTS = 100
"""Pictured beside those that are marked, the worst first: about 0.3 MB each."""

CLASSES = {"failed": "failed", "reject": "reject", "review": "look", "ok": "ok"}
"""Verdict -> class of the style sheet."""


def write_scan_report(report: Path, most: int = MOST_PATIENTS) -> Path:
    """Write one HTML file, REPORT/report.html, about all patients that have a record there.

    Args:
        most: how many patients are pictured, the worst first; those that are marked always are.

    Raises:
        InputError: there are no records, or another file has the name.
        OutputError: it cannot be written.
    """
    path = report / FILE_NAME
    records, faults = read_scan_records(report)
    if not records:
        raise InputError(f"no records of patients' scans in {report}; 'cwdm scan --report_path' writes them")
    check_replaceable(path)
    environment = environment_for([f"{report.absolute().parent}/"])
    page = environment.get_template("scans.html").generate(**_page(records, faults, most))
    write_atomically(path, lambda file: write_page(file, page))
    return path


def _page(records: Sequence[ScanRecord], faults: Sequence[str], most: int) -> dict[str, Any]:
    counts = Counter(record.verdict for record in records)
    worth = sum(count for verdict, count in counts.items() if verdict != "ok")
    patients = "1 patient" if len(records) == 1 else f"{len(records)} patients"
    script = packaged("templates/report.js")
    return {
        "policy": Markup(security_policy([script])),
        "program": GENERATOR,
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "headline": f"{worth} of {patients} should be looked at" if worth else f"{patients}, nothing found to look at",
        "faults": faults,
        "css": Markup(packaged("templates/report.css")),
        "tally": [(verdict, CLASSES[verdict], counts[verdict]) for verdict in VERDICTS if counts[verdict]],
        "rows": list(_rows(records, most)),
        "script": Markup(script),
    }


def _rows(records: Sequence[ScanRecord], most: int) -> Iterator[dict[str, Any]]:
    for number, record in enumerate(records):
        pictured = number < most or record.verdict != "ok"
        yield {
            "number": number,
            "record": record,
            "style": CLASSES[record.verdict],
            "rank": VERDICTS.index(record.verdict),
            "whys": [*record.reasons, *record.remarks],
            "panels": [_panel(panel) for panel in record.panels] if pictured else [],
            "metrics": [(name, f"{value:g}") for name, value in record.metrics.items()],
        }


def _panel(panel: Any) -> dict[str, Any]:
    rows = []
    for name, tiles in zip(panel.rows, panel.tiles, strict=False):
        shown = [(Markup(tile.uri), tile, column) for tile, column in zip(tiles, panel.columns, strict=False)]
        rows.append((name, shown))
    return {"title": panel.title, "columns": panel.columns, "rows": rows}
