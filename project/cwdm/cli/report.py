"""`cwdm report`, and the report at the end of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from cwdm.cli.options import count, data
from cwdm.errors import needs_extra
from cwdm.files import is_file
from cwdm.progress import print_line

FILE_NAME = "report.html"


def report(
    records: Annotated[Path, typer.Argument(metavar="REPORT", help="Folder that 'cwdm infer --report_path' filled.")],
    data_path: Annotated[Path | None, data("Folder with the case folders. Default: as recorded.")] = None,
    synthesised: Annotated[Path | None, typer.Option(help="Folder with the outputs. Default: as recorded.")] = None,
    old_synthesised: Annotated[Path | None, typer.Option("--output_path", hidden=True)] = None,
    truth: Annotated[
        Path | None, typer.Option(help="True images: complete case folders, or files named like the outputs.")
    ] = None,
    viewer: Annotated[
        list[str] | None, typer.Option(metavar="CASE", help="Case that gets a slice viewer; repeat for several.")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="Folder that 'cwdm evaluate' filled. Default: --truth is scored.")
    ] = None,
    num_cases: Annotated[
        int, count("cases", "How many cases are pictured, the worst first; those that are marked always are.", least=0)
    ] = 60,
    num_workers: Annotated[
        int | None, count("workers", "Images scored at a time, 0.75 GB each. Default: one a processor, at most 8.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for report.html, or a file of another name. Default: REPORT."),
    ] = None,
) -> None:
    """Write one HTML file about a run: what to look at first, slices, histograms, settings, checksums."""
    from cwdm.progress import CohortProgress

    write_report = _write_report()
    from cwdm.report import ReportPaths

    paths = ReportPaths(records, data_path, synthesised or old_synthesised, truth, scores)
    file = out if out is None or out.suffix or is_file(out) else out / FILE_NAME
    with CohortProgress(0) as progress:
        path = write_report(paths, viewer or (), num_cases, file, num_workers, progress)
    print_line(f"look at {path}")


def report_on_run(report_path: Path, data_path: Path, output_path: Path, log: Callable[[str], None]) -> None:
    """The report at the end of a run, whose exit code tells of the cases, not of this."""
    try:
        write_report = _write_report()
        from cwdm.report import ReportPaths

        log(f"look at {write_report(ReportPaths(report_path, data_path, output_path))}")
    except Exception as error:
        log(f"warning: no report was written: {error}")


def _write_report() -> Callable[..., Path]:
    with needs_extra("report", "what the report needs"):
        from cwdm.report import write_report
    return write_report
