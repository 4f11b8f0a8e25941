"""`cwdm phantom`."""

import math
from pathlib import Path
from typing import Annotated

import typer

from cwdm.cli.old import REQUIRED, Word, either
from cwdm.cli.options import count, output
from cwdm.cli.outcomes import sum_up
from cwdm.errors import SettingsError
from cwdm.progress import CohortProgress, print_line


def phantom(
    out: Word = None,
    output_path: Annotated[Path | None, output(f"Folder for the case folders. {REQUIRED}")] = None,
    num_cases: Annotated[int, count("cases", "How many synthetic patients to make; with --from, of each patient.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The same seed makes the same patients.")] = 0,
    spacing: Annotated[
        float,
        typer.Option(min=1, max=8, help="Edge of the cubic voxels, mm; 4 makes patients to try things on quickly."),
    ] = 1.0,
    wide: Annotated[bool, typer.Option("--wide", help="Let them differ more than patients do, for training.")] = False,
    skull: Annotated[
        bool, typer.Option("--skull", help="Leave skull and scalp around the brains, as before anything is stripped.")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Folder of real cases to image anew, as other scanners would have. It is only read."
        ),
    ] = None,
) -> None:
    """Make synthetic patients: four modalities and a segmentation each, in the BraTS layout."""
    from cwdm.phantoms import WIDE, add_skull, reimage_cases, write_phantoms

    folder = either(output_path, out, "--output_path")
    if source and skull:
        raise SettingsError("--skull is for synthetic patients; the cases of --from stay stripped")
    if source:
        log = CohortProgress(0).log
        outcomes = reimage_cases(source, folder, num_cases, seed, WIDE if wide else None, lambda one: log(one.line))
        raise typer.Exit(sum_up(outcomes, folder, log))
    x, y, z = (math.ceil(voxels / spacing) for voxels in (240, 240, 155))
    variation, around = WIDE if wide else None, add_skull if skull else None
    write_phantoms(folder, num_cases, seed, (x, y, z), spacing, variation, print_line, around=around)
