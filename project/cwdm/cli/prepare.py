"""`cwdm prepare`."""

from pathlib import Path
from typing import Annotated

import typer

from cwdm.cli.app import Command
from cwdm.cli.old import REQUIRED, Word, either
from cwdm.cli.options import output
from cwdm.cli.outcomes import sum_up
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
