"""The HTML report, because people would rather look than read.

The report is one file that needs nothing beside it: styles, script, pictures and, for the cases asked for, volumes
and the viewer stand inside. Its content security policy forbids the browser to fetch anything or to run other scripts.
"""

import base64
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import IO, Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from cwdm import __version__
from cwdm.errors import CwdmError, InputError
from cwdm.files import check_writable, write_atomically
from cwdm.report.data import Entry, Records, ReportPaths, RunRecord, read_records, read_volumes
from cwdm.report.pictures import pictures_of, thumbnail, viewer_volumes

MOST_CASES = 60
"""Pictured in a report, the worst first: about 0.15 MB and 2 s each."""

FILE_NAME = "report.html"

WORDS = {"failed": "failed", "reject": "reject", "look": "look", "unchecked": "not checked", "ok": "ok"}


def write_report(
    paths: ReportPaths,
    viewers: Sequence[str] = (),
    most: int = MOST_CASES,
    path: Path | None = None,
) -> Path:
    """Write one HTML file about all that a report folder tells; memory holds one case at a time.

    Args:
        paths: the report folder, and where volumes are looked for.
        viewers: names of cases that get a slice viewer, about 6 MB each.
        most: how many cases are pictured, the worst first; those with a viewer always are.
        path: the file; None: report.html in the report folder.

    Returns:
        The file.

    Raises:
        InputError: there are no records, or none of a case that should have a viewer.
        OutputError: the file cannot be written.
    """
    path = path or paths.report / FILE_NAME
    records = read_records(paths.report)
    known = {entry.case for entry in records.entries}
    if unknown := [case for case in viewers if case not in known]:
        raise InputError(f"no record of {', '.join(unknown)} in {paths.report}; --viewer takes a case's name")
    if paths.truth and not paths.truth.is_dir():
        raise InputError(f"the folder {paths.truth} of true images does not exist; check --truth")
    check_writable(path.parent)
    environment = _environment()
    common = _common_warnings(records.entries)
    pictured = [number for number, entry in enumerate(records.entries) if not entry.failed][:most]
    with tempfile.TemporaryFile() as sections:
        rows = [
            _row(number, entry, paths, entry.case in viewers, number in pictured, common, environment, sections)
            for number, entry in enumerate(records.entries)
        ]
        rows.sort(key=_worst_first)
        page = environment.get_template("report.html").generate(
            **_page(records, rows, common, bool(viewers)), sections=_read_back(sections, rows)
        )
        write_atomically(path, lambda file: _write_page(file, page))
    return path


@dataclass(frozen=True)
class Row:
    """A line of the overview, and where in the temporary file the section stands that it leads to."""

    number: int
    entry: Entry
    whys: Sequence[str]
    thumbnail: str = ""
    psnr_db: float | None = None
    ssim: float | None = None
    section_start: int = 0
    section_bytes: int = 0

    @property
    def pictured(self) -> bool:
        return self.section_bytes > 0

    @property
    def spread(self) -> float | None:
        return self.entry.quality.figures.get("spread") if self.entry.quality else None

    @property
    def seconds(self) -> float | None:
        return self.entry.record.seconds if self.entry.record else None


def _row(
    number: int,
    entry: Entry,
    paths: ReportPaths,
    viewer: bool,
    pictured: bool,
    common: Sequence[str],
    environment: jinja2.Environment,
    sections: IO[bytes],
) -> Row:
    """Write a case's section and tell what the overview says of it."""
    warnings = [warning for warning in entry.warnings if warning not in common]
    reasons = [entry.reason] if entry.failed else list(entry.quality.reasons if entry.quality else ())
    if entry.failed or not (pictured or viewer):
        return Row(number, entry, reasons + warnings)
    shown = None
    try:
        shown = read_volumes(entry, paths)
    except (CwdmError, OSError) as error:
        warnings.append(f"not pictured: {getattr(error, 'reason', error)}")
    if shown and paths.truth and shown.truth is None:
        warnings.append(f"its true image is not in {paths.truth}")
    section = environment.get_template("case.html").render(
        number=number,
        entry=entry,
        words=WORDS,
        whys=reasons,
        warnings=warnings,
        figures=[(name, f"{value:g}") for name, value in (entry.quality.figures if entry.quality else {}).items()],
        **pictures_of(shown, entry.modality) if shown else {},
        **viewer_volumes(shown, entry.modality) if shown and viewer else {},
    )
    start, length = sections.tell(), sections.write(_bytes(section))
    row = Row(number, entry, reasons + warnings, section_start=start, section_bytes=length)
    if shown is None:
        return row
    return replace(row, thumbnail=thumbnail(shown), psnr_db=shown.psnr_db, ssim=shown.ssim)


def _worst_first(row: Row) -> tuple[int, float, int]:
    """By the check, then by the agreement with the truth where there is one."""
    return row.entry.rank, row.psnr_db if row.psnr_db is not None else np.inf, row.number


def _read_back(sections: IO[bytes], rows: Iterable[Row]) -> Iterator[Markup]:
    for row in rows:
        sections.seek(row.section_start)
        yield Markup(sections.read(row.section_bytes).decode())


def _write_page(file: IO[bytes], page: Iterable[str]) -> None:
    for part in page:
        file.write(_bytes(part))


def _bytes(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # names of files can be any bytes


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("cwdm.report"), autoescape=True, undefined=_Absent, finalize=_visible
    )


class _Absent(jinja2.ChainableUndefined):
    """What a case without pictures leaves out."""


def _visible(value: Any) -> Any:
    """Text as it is but for what does not print: a name may hold what turns the rest of the line around."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in value)


def _page(records: Records, rows: Sequence[Row], common: Sequence[str], with_viewer: bool) -> dict[str, Any]:
    verdicts = [entry.verdict for entry in records.entries]
    scripts = [_part("templates/report.js")]
    scripts += [_part("vendor/niivue/niivue.umd.js"), _part("templates/viewer.js")] if with_viewer else []
    return {
        "policy": _policy(scripts),
        "program": f"cwdm {__version__}",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "headline": _headline(verdicts),
        "tally": [(verdict, verdicts.count(verdict)) for verdict in WORDS if verdict in verdicts],
        "words": WORDS,
        "notices": common,
        "faults": records.faults,
        "css": Markup(_part("templates/report.css")),
        "rows": rows,
        "has_truth": any(row.psnr_db is not None for row in rows),
        "has_spread": any(row.spread is not None for row in rows),
        "pictured": sum(row.pictured for row in rows),
        "left_out": sum(not row.pictured and not row.entry.failed for row in rows),
        "made": list(_made(records.entries)),
        "runs": [_run(run) for run in records.runs],
        "viewer_note": _part("vendor/niivue/NOTICE").strip() if with_viewer else "",
        "scripts": [Markup(script) for script in scripts],
    }


def _headline(verdicts: Sequence[str]) -> str:
    count = len(verdicts)
    worth = sum(verdict not in ("ok", "unchecked") for verdict in verdicts)
    cases = "1 case" if count == 1 else f"{count} cases"
    if worth:
        return f"{worth} of {cases} should be looked at"
    return f"{cases}, not checked" if "unchecked" in verdicts else f"{cases}, nothing found to look at"


def _common_warnings(entries: Sequence[Entry]) -> list[str]:
    """What is said of every written case, and so need be said but once."""
    written = [set(entry.warnings) for entry in entries if not entry.failed]
    return sorted(set.intersection(*written)) if len(written) > 1 else []


class Provenance(NamedTuple):
    modalities: str
    notice: str
    weights: str
    sha256: str
    sampler: str
    precision: str
    device: str
    program: str
    settings: list[tuple[str, str]]


def _made(entries: Iterable[Entry]) -> Iterator[Provenance]:
    """Each way in which cases were made, with the contrasts made so."""
    ways: dict[str, list[Entry]] = {}
    for entry in entries:
        if record := entry.record:
            way = record.model_dump(include={"program", "weights", "sampler", "timesteps", "device", "precision"})
            ways.setdefault(json.dumps([way, record.settings], sort_keys=True), []).append(entry)
    for alike in ways.values():
        record = alike[0].record
        assert record
        modalities = sorted({entry.modality for entry in alike})
        count = len({entry.case for entry in alike})
        cases = "1 case" if count == 1 else f"{count} cases"
        steps = len(record.timesteps)
        yield Provenance(
            modalities=f"{', '.join(modalities)} of {cases}",
            notice=str(record.weights_record.get("notice", "")),
            weights=record.weights.file,
            sha256=record.weights.sha256,
            sampler=f"{record.sampler}, {steps} step{'s' * (steps != 1)}",
            precision=record.precision,
            device=record.device,
            program=record.program,
            settings=list(_flat(record.settings)),
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", json.dumps(value) if isinstance(value, bool | list) else str(value)


def _run(run: RunRecord) -> dict[str, Any]:
    counts = {status: sum(case.status == status for case in run.cases) for status in ("written", "skipped", "failed")}
    return {"started": run.started, "seconds": run.seconds, "program": run.program, **counts}


def _policy(scripts: Iterable[str]) -> str:
    """A content security policy under which nothing is fetched, and no script runs but these."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _part(name: str) -> str:
    return resources.files("cwdm.report").joinpath(name).read_text(encoding="utf-8")
