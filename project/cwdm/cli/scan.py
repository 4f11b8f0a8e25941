"""`cwdm scan`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cwdm.cli.infer import ParametersFile, ReportPath, Shard, Weights
from cwdm.cli.options import DeviceOption, Modality, Overwrite, Settings, output
from cwdm.cli.outcomes import sum_up
from cwdm.errors import needs_extra

if TYPE_CHECKING:
    from cwdm.runner import Outcome
    from cwdm.scans import PatientFolder

Scans = Annotated[
    Path,
    typer.Argument(metavar="SCANS", help="Folder of patients' NIfTI or DICOM, or BIDS. It is only read."),
]
Space = Annotated[
    Literal["sri24", "mni152", "native"],
    typer.Option(help="Where the network sees the images: BraTS' atlas, that of challenges since 2025, or their own."),
]
Modalities = Annotated[
    Path | None, typer.Option(metavar="TABLE", help="CSV that says which image is which: patient, scan, modality.")
]
BrainMask = Annotated[
    str,
    typer.Option(
        metavar="PATH",
        help="Masks of your own instead of HD-BET's, such as 'masks/{patient}-{modality}.nii.gz'.",
    ),
]
KeepRejected = Annotated[
    bool, typer.Option("--keep-rejected", help="Go on with patients whose registration the check rejects.")
]


def scan(
    scans: Scans,
    output_path: Annotated[Path, output("Folder for a folder a patient; for a BIDS dataset, of derivatives.")],
    weights: Weights = None,
    space: Space = "sri24",
    grid: Annotated[
        Modality | None, typer.Option(help="Scan on whose grid results lie. Default: the best-resolved one.")
    ] = None,
    modalities: Modalities = None,
    brain_mask: BrainMask = "",
    dicom: Annotated[bool, typer.Option("--dicom", help="Write derived DICOM series, too.")] = False,
    keep_atlas: Annotated[
        bool, typer.Option("--keep-atlas", help="Write the case in the space and the transforms (ITK), too.")
    ] = False,
    keep_rejected: KeepRejected = False,
    parameters_file: ParametersFile = None,
    device: DeviceOption = "auto",
    overwrite: Overwrite = False,
    shard: Shard = "0/1",
    report_path: ReportPath = None,
    settings: Settings = None,
) -> None:
    """Synthesise what is missing among scans as they come, where they lie.

    Skull on, thick slices, each modality on its own grid: they are stripped, registered and judged.
    The result comes back onto the grid of one of them.

    A patient that is done already is skipped, so a stopped run goes on where it was.
    """
    with needs_extra("scans", "what raw scans need"):
        from cwdm.scans import ScanOptions, check_places, find_patients, read_table, scan_patients
    check_reporting(report_path)
    from cwdm.inference import Synthesizer
    from cwdm.precision import warn_of_precision
    from cwdm.progress import CohortProgress
    from cwdm.settings import load_settings
    from cwdm.weights import check_usable, folder_of

    loaded = load_settings(parameters_file, settings or ())
    table = read_table(modalities) if modalities else None
    options = ScanOptions(space, table, brain_mask, grid or "", dicom, keep_atlas, keep_rejected)
    patients = find_patients(scans)
    check_places(scans, patients, output_path, report_path)
    patients = share(patients, shard)
    synthesizer = Synthesizer(weights, loaded, device)
    progress = CohortProgress(len(patients))
    progress.log(f"{len(patients)} patients; {synthesizer.summary()}")
    warn_of_precision(synthesizer.dtype, synthesizer.device, progress.log)
    outcomes = scan_patients(
        patients, synthesizer, output_path, options, overwrite=overwrite, report=report_path, progress=progress
    )
    code = conclude(outcomes, output_path, report_path, progress.log)
    if code and not any(outcome.status != "failed" for outcome in outcomes):
        check_usable(folder_of(weights), [one.value for one in Modality])
    raise typer.Exit(code)


def check_reporting(report: Path | None) -> None:
    """Refuse a report that cannot be made before anything is spent on it."""
    if report:
        with needs_extra("report", "what the report needs"):
            from cwdm.report import write_scan_record, write_scan_report  # noqa: F401


def share(patients: "list[PatientFolder]", shard: str) -> "list[PatientFolder]":
    """The patients of one job."""
    from cwdm.inference import select_shard

    return select_shard(patients, [patient.name for patient in patients], shard)


def conclude(outcomes: "list[Outcome]", output: Path, report: Path | None, log: Callable[[str], None]) -> int:
    """The end of a run: the exit code, and the report, which decides nothing."""
    code = sum_up(outcomes, output, log, "patients", "--overwrite")
    if report:
        from cwdm.report import write_scan_report

        try:
            log(f"look at {write_scan_report(report)}")
        except Exception as error:
            log(f"warning: no report was written: {error}")
    return code
