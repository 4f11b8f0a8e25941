"""`cwdm drop`."""

from pathlib import Path
from typing import Annotated

import typer

from cwdm.cli.old import REQUIRED, Word, either
from cwdm.cli.options import Copy, output
from cwdm.cli.outcomes import sum_up
from cwdm.progress import CohortProgress, print_line
from cwdm.runner import Outcome


def drop(
    data_path: Annotated[Path, typer.Argument(metavar="IN", help="Folder of complete cases. It is only read.")],
    out: Word = None,
    output_path: Annotated[Path | None, output(f"Folder for the cases with one modality less. {REQUIRED}")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice; 123456 gives the published script's.")] = 123456,
    copy: Copy = False,
) -> None:
    """Take one modality away from every complete case, to test against the truth."""
    from cwdm.prepare import drop_modalities

    folder = either(output_path, out, "--output_path")
    dropped = drop_modalities(data_path, folder, seed, copy)
    for case, modality in dropped:
        print_line(f"{case}: {modality} taken away")
    raise typer.Exit(sum_up([Outcome(case, "written") for case, _ in dropped], folder, CohortProgress(0).log))
