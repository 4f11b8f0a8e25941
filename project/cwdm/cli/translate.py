"""`cwdm translate`."""

from pathlib import Path
from typing import Annotated

import typer

from cwdm.cli.old import REQUIRED, first_of
from cwdm.cli.options import DeviceOption, Settings, data, output
from cwdm.cli.outcomes import sum_up


def translate(
    data_path: Annotated[Path, data("Folder of the images, laid out as for training. It is only read.")],
    output_path: Annotated[Path, output("Folder for <case>.nii.gz, flat.")],
    settings: Settings = None,
    weights: Annotated[
        Path | None, typer.Option(help=f"Weights that 'cwdm train' with layout: files wrote. {REQUIRED}")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Make CT from MR, or whatever else a network was trained on.

    A case that is done already is skipped, so a stopped run goes on where it was.
    """
    from cwdm import inference
    from cwdm.precision import warn_of_precision
    from cwdm.progress import CohortProgress
    from cwdm.settings import load_settings

    file, given = first_of(weights, settings)
    translator = inference.Translator(file, load_settings(None, given), device)
    with CohortProgress(0) as progress:
        warn_of_precision(translator.pipeline.dtype, translator.pipeline.device, progress.log)
        outcomes = inference.translate(translator, data_path, output_path, progress.end_case, progress.expect)
    raise typer.Exit(sum_up(outcomes, output_path, progress.log))
