"""`cwdm sample`."""

from pathlib import Path
from typing import Annotated

import typer

from cwdm.cli.old import REQUIRED, first_of
from cwdm.cli.options import DeviceOption, Settings, output
from cwdm.cli.outcomes import sum_up
from cwdm.runner import Outcome


def sample(
    output_path: Annotated[Path, output("Folder for sample-00000.nii.gz and on.")],
    settings: Settings = None,
    weights: Annotated[Path | None, typer.Option(help=f"Weights of an unconditional network. {REQUIRED}")] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", min=1, help="How many volumes to make.")] = 1,
    size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(metavar="X Y Z", help="Voxels. Default: those that the network was trained on."),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Generate whole volumes.

    A volume that is there already stays, so a stopped run goes on where it was.
    """
    from cwdm.inference import Generator, write_samples
    from cwdm.precision import warn_of_precision
    from cwdm.progress import CohortProgress, printable
    from cwdm.settings import load_settings

    file, given = first_of(weights, settings)
    generator = Generator(file, load_settings(None, given), size, device)
    outcomes: list[Outcome] = []
    with CohortProgress(num_samples) as progress:

        def tell(outcome: Outcome) -> None:
            told = {"written": "written", "skipped": "there already", "failed": f"FAILED: {outcome.reason}"}
            progress.end_case(printable(f"{output_path / outcome.name}: {told[outcome.status]}"))
            outcomes.append(outcome)

        warn_of_precision(generator.pipeline.dtype, generator.pipeline.device, progress.log)
        write_samples(generator, num_samples, output_path, tell)
    raise typer.Exit(sum_up(outcomes, output_path, progress.log, "volumes"))
