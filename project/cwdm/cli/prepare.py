"""`cwdm prepare`."""

from pathlib import Path
from typing import Annotated

import typer

from cwdm.cli.app import Command
from cwdm.cli.infer import ReportPath, Shard
from cwdm.cli.old import REQUIRED, Word, either
from cwdm.cli.options import DeviceOption, Modality, Overwrite, output
from cwdm.cli.outcomes import sum_up
from cwdm.cli.scan import BrainMask, KeepRejected, Modalities, Scans, Space, check_reporting, conclude, share
from cwdm.errors import needs_extra
from cwdm.progress import CohortProgress, print_line

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Bring other data into the form that training reads."
)


@app.callback()
def _prepare() -> None:
    """A callback makes a family of what has one command so far."""


@app.command(cls=Command)
def lidc(
    dicom: Annotated[
        Path, typer.Argument(metavar="DICOM_DIR", help="Folder of LIDC-IDRI or other CT. It is only read.")
    ],
    out: Word = None,
    output_path: Annotated[Path | None, output(f"Folder for one .nii.gz a series. {REQUIRED}")] = None,
) -> None:
    """CT from DICOM: 1 mm, 256³ around the centre, -1000 HU to the 0.999 quantile as [0, 1]."""
    with needs_extra("train", "what this needs"):
        from cwdm.prepare import prepare_lidc

    folder = either(output_path, out, "--output_path")
    raise typer.Exit(sum_up(prepare_lidc(dicom, folder, print_line), folder, CohortProgress(0).log, "series"))


@app.command(cls=Command)
def scans(
    scans: Scans,
    out: Word = None,
    output_path: Annotated[Path | None, output(f"Folder for a case folder a patient. {REQUIRED}")] = None,
    space: Space = "sri24",
    reference: Annotated[
        Modality | None, typer.Option(help="Scan that the others are registered to. Default: the best-resolved one.")
    ] = None,
    modalities: Modalities = None,
    brain_mask: BrainMask = "",
    keep_transforms: Annotated[
        bool, typer.Option("--keep-transforms", help="Write how the images came there, as ITK files, too.")
    ] = False,
    keep_rejected: KeepRejected = False,
    device: DeviceOption = "auto",
    overwrite: Overwrite = False,
    shard: Shard = "0/1",
    report_path: ReportPath = None,
) -> None:
    """Raw MR scans, stripped and registered: case folders in one space, as training and challenges' containers read."""
    with needs_extra("scans", "what raw scans need"):
        from cwdm.scans import ScanOptions, check_places, find_patients, prepare_patients, read_table

    check_reporting(report_path)
    folder = either(output_path, out, "--output_path")
    table = read_table(modalities) if modalities else None
    options = ScanOptions(space, table, brain_mask, reference or "", False, keep_transforms, keep_rejected)
    patients = find_patients(scans)
    check_places(scans, patients, folder, report_path)
    patients = share(patients, shard)
    progress = CohortProgress(len(patients))
    outcomes = prepare_patients(
        patients, folder, options, device, overwrite=overwrite, report=report_path, progress=progress
    )
    raise typer.Exit(conclude(outcomes, folder, report_path, progress.log))
