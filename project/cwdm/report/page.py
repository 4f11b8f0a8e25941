"""The HTML report, because people would rather look than read.

The report is one file that needs nothing beside it: styles, script, pictures and, for the cases asked for, volumes
and the viewer stand inside. Its content security policy forbids the browser to fetch anything or to run other scripts.
"""

import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from cwdm.calibration import coverage, rank_correlation
from cwdm.errors import CwdmError, InputError
from cwdm.evaluation import Score
from cwdm.files import check_writable, is_folder, output_errors, write_atomically
from cwdm.inference import RunRecord
from cwdm.progress import CohortProgress
from cwdm.report.data import PREDICTED_STD, CaseVolumes, Entry, Records, ReportPaths, read_records, read_volumes
from cwdm.report.html import (
    GENERATOR,
    as_bytes,
    check_replaceable,
    environment_for,
    packaged,
    security_policy,
    write_page,
)
from cwdm.report.pictures import map_colours, pictures_of, thumbnail, viewer_volumes
from cwdm.report.scores import PSNR, SSIM, Scores, find_poor, read_scores, score_entries

MOST_CASES = 60
"""Pictured in a report beside those that are marked, the worst first: about 0.1 MB and 2 s each."""

FILE_NAME = "report.html"

WORDS = {"failed": "failed", "reject": "reject", "look": "look", "unchecked": "not checked", "ok": "ok"}
"""For the verdicts, the worst first."""

STD_HEADINGS = {"std": "Predicted std", "spread": "Spread"}
"""Of the column of figures of this name."""

MARKED = ("reject", "look")
"""Verdicts of images that someone should see."""


def write_report(
    paths: ReportPaths,
    viewers: Sequence[str] = (),
    most: int = MOST_CASES,
    path: Path | None = None,
    workers: int | None = None,
    progress: CohortProgress | None = None,
) -> Path:
    """Write one HTML file about all that a report folder tells.

    Args:
        paths: the report folder, and where volumes and scores are looked for.
        viewers: names of cases that get a slice viewer, about 6 MB each.
        most: how many cases are pictured, the worst first; those that are marked and those with a viewer always are.
        path: the file; None: report.html in the report folder.
        workers: images that are scored at a time; None for one a processor, eight at most.
        progress: told of each score.

    Returns:
        The file.

    Raises:
        InputError: there are no records, or none of a case that should have a viewer; or another file has the name.
        OutputError: the file cannot be written.
    """
    path = path or paths.report / FILE_NAME
    records = read_records(paths.report)
    known = {entry.case for entry in records.entries}
    if unknown := [case for case in viewers if case not in known]:
        raise InputError(f"no record of {', '.join(unknown)} in {paths.report}; --viewer takes a case's name")
    if paths.truth and not is_folder(paths.truth):
        raise InputError(f"the folder {paths.truth} of true images does not exist; check --truth")
    check_writable(path.parent)
    check_replaceable(path)
    environment = environment_for(_folders(paths, records.entries))
    common = _common_warnings(records.entries)
    rows = _rows(records.entries, common, _scores(records.entries, paths, workers, progress))
    chosen = _chosen(rows, viewers, most)
    with output_errors(path.parent), tempfile.TemporaryFile(dir=path.parent) as sections:
        drawn = [
            _draw(row, paths, row.entry.case in viewers, environment, sections) if row.number in chosen else row
            for row in rows
        ]
        sections.seek(0)
        page = environment.get_template("report.html").generate(
            **_page(records, drawn, common, bool(viewers)), sections=(Markup(line.decode()) for line in sections)
        )
        write_atomically(path, lambda file: write_page(file, page))
    return path


# Rows


@dataclass(frozen=True)
class Row:
    """A line of the overview.

    Attributes:
        number: names the case's section.
        warnings: but for those that all cases share.
        poor: why its score should be looked at.
        pictured: whether there is a section.
        thumbnail: URI of a picture.
    """

    number: int
    entry: Entry
    warnings: tuple[str, ...]
    score: Score | None = None
    poor: str = ""
    pictured: bool = False
    thumbnail: str = ""

    @property
    def verdict(self) -> str:
        """That of the check, unless it lets an image pass whose score is poor."""
        return "look" if self.poor and self.entry.verdict in ("unchecked", "ok") else self.entry.verdict

    @property
    def rank(self) -> int:
        return list(WORDS).index(self.verdict)

    @property
    def reasons(self) -> list[str]:
        """Of the verdict."""
        if self.entry.failed:
            return [self.entry.reason]
        return [self.poor] * bool(self.poor) + list(self.entry.quality.reasons if self.entry.quality else ())

    @property
    def whys(self) -> list[str]:
        """All that is to be said of it."""
        return [*self.reasons, *self.warnings]

    @property
    def psnr_db(self) -> float | None:
        return self.score.metrics.get(PSNR) if self.score else None

    @property
    def ssim(self) -> float | None:
        return self.score.metrics.get(SSIM) if self.score else None

    @property
    def std_name(self) -> str:
        """Of the figure that says how large the standard deviation is: predicted, or over samples."""
        figures = self.entry.quality.figures if self.entry.quality else {}
        return next((name for name in STD_HEADINGS if name in figures), "")

    @property
    def std(self) -> float | None:
        return self.entry.quality.figures[self.std_name] if self.entry.quality and self.std_name else None

    @property
    def seconds(self) -> float | None:
        return self.entry.record.seconds if self.entry.record else None


def _scores(
    entries: Sequence[Entry], paths: ReportPaths, workers: int | None, progress: CohortProgress | None
) -> Scores:
    if paths.scores:
        return read_scores(paths.scores, entries, paths)
    if not paths.truth:
        return {}
    if progress is None:
        return score_entries(entries, paths, workers)
    progress.expect(sum(not entry.failed for entry in entries))
    return score_entries(entries, paths, workers, lambda score: progress.end_case(score.line))


def _rows(entries: Sequence[Entry], common: Collection[str], scores: Scores) -> list[Row]:
    """The worst first: by the check, then by the agreement with the truth where there is one."""
    poor = find_poor(scores)
    rows = []
    for number, entry in enumerate(entries):
        key = entry.case, entry.modality
        score = scores.get(key)
        warnings = [warning for warning in entry.warnings if warning not in common]
        warnings += [f"not scored: {score.reason}"] if score and score.reason else []
        rows.append(Row(number, entry, tuple(warnings), score, poor.get(key, "")))
    return sorted(rows, key=lambda row: (row.rank, row.psnr_db if row.psnr_db is not None else np.inf, row.number))


def _chosen(rows: Sequence[Row], viewers: Collection[str], most: int) -> set[int]:
    """Numbers of the rows that are pictured."""
    there = [row for row in rows if not row.entry.failed]
    wanted = [row for row in there if row.verdict in MARKED or row.entry.case in viewers]
    return {row.number for row in (*there[:most], *wanted)}


def _draw(row: Row, paths: ReportPaths, viewer: bool, environment: jinja2.Environment, sections: IO[bytes]) -> Row:
    """The row of a case whose section was added to a file."""
    shown, modality = None, row.entry.modality
    try:
        shown = read_volumes(row.entry, paths)
        row = replace(row, warnings=(*row.warnings, *shown.notes))
    except (CwdmError, OSError) as error:
        row = replace(row, warnings=(*row.warnings, f"not pictured: {getattr(error, 'reason', error)}"))
    figures = {**(row.entry.quality.figures if row.entry.quality else {}), **(_agreement(shown) if shown else {})}
    section = environment.get_template("case.html").render(
        row=row,
        entry=row.entry,
        words=WORDS,
        figures=[(name, f"{value:g}") for name, value in figures.items()],
        **pictures_of(shown, row.entry.case, modality, row.number) if shown else {},
        **viewer_volumes(shown, modality) if shown and viewer else {},
    )
    sections.write(as_bytes(section))
    return replace(row, pictured=True, thumbnail=thumbnail(shown) if shown else "")


def _agreement(shown: CaseVolumes) -> dict[str, float]:
    """What a predicted standard deviation is worth, where there is a true image to tell.

    It is a share of the brain that would be 0.68 and a rank correlation, over an eighth of the voxels.
    """
    if shown.difference is None or shown.std is None or shown.std_name != PREDICTED_STD:
        return {}
    error, std = shown.difference[shown.mask][::8], shown.std[shown.mask][::8]
    return {"std_coverage": coverage(error, std), "std_rank_correlation": rank_correlation(error, std)}


# The page


def _folders(paths: ReportPaths, entries: Iterable[Entry]) -> list[str]:
    """The folders that messages may speak of, the longest first."""
    told = [Path(file) for entry in entries if entry.record for file in (entry.record.input, entry.record.output)]
    given = [path for path in (paths.report, paths.data, paths.output, paths.truth, paths.scores) if path]
    absolute = {path.absolute().parent for path in (*told, *given) if path.name}
    return sorted((f"{folder}/" for folder in absolute if folder.name), key=len, reverse=True)


def _page(records: Records, rows: Sequence[Row], common: Sequence[str], with_viewer: bool) -> dict[str, Any]:
    verdicts = [row.verdict for row in rows]
    scripts = [packaged("templates/report.js")]
    scripts += [packaged("vendor/niivue/niivue.umd.js"), packaged("templates/viewer.js")] if with_viewer else []
    return {
        "policy": Markup(security_policy(scripts)),
        "program": GENERATOR,
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "headline": _headline(verdicts),
        "tally": [(verdict, verdicts.count(verdict)) for verdict in WORDS if verdict in verdicts],
        "modalities": sorted({row.entry.modality for row in rows} - {""}),
        "words": WORDS,
        "notices": common,
        "faults": records.faults,
        "css": Markup(packaged("templates/report.css")),
        "map_colours": Markup(map_colours()),
        "rows": rows,
        "has_scores": any(row.psnr_db is not None for row in rows),
        "stds": {name: heading for name, heading in STD_HEADINGS.items() if any(r.std_name == name for r in rows)},
        "pictured": sum(row.pictured for row in rows),
        "left_out": sum(not row.pictured and not row.entry.failed for row in rows),
        "made": list(_made(records.entries)),
        "runs": [_run(run) for run in records.runs],
        "viewer_note": packaged("vendor/niivue/NOTICE").strip() if with_viewer else "",
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
            way = {
                key: asdict(record)[key]
                for key in ("program", "weights", "sampler", "timesteps", "device", "precision")
            }
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
