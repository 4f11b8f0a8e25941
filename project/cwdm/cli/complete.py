"""`cwdm complete`."""

from pathlib import Path
from typing import Annotated

import typer

from cwdm.cli.old import REQUIRED, Word, either
from cwdm.cli.options import Copy, output
from cwdm.cli.outcomes import sum_up
from cwdm.progress import CohortProgress


def complete(
    data_path: Annotated[
        Path, typer.Argument(metavar="IN", help="Folder of cases with modalities missing. It is only read.")
    ],
    synthesised: Annotated[Path, typer.Option(help="Output folder of 'cwdm infer' on IN. It is only read.")],
    out: Word = None,
    output_path: Annotated[Path | None, output(f"Folder for the cases with all four. {REQUIRED}")] = None,
    copy: Copy = False,
) -> None:
    """Put original and synthesised images together for a segmenter, with a record of which is which."""
    from cwdm.prepare import complete_cases

    folder = either(output_path, out, "--output_path")
    progress = CohortProgress(0)
    outcomes = complete_cases(
        data_path, synthesised, folder, copy, lambda outcome: progress.log(outcome.line, lines=True)
    )
    raise typer.Exit(sum_up(outcomes, folder, progress.log))
