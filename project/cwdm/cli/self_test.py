"""`cwdm self-test`."""

from pathlib import Path
from typing import Annotated

import typer

from cwdm.cli.options import Modality
from cwdm.progress import print_line


def self_test(
    weights: Annotated[Path | None, typer.Option(help="Folder or file of weights, or 'bundled'.")] = None,
    modality: Annotated[
        list[Modality] | None, typer.Option(help="Modality to try; repeat for several. Default: all four.")
    ] = None,
) -> None:
    """Load the weights of every modality and synthesise a tiny phantom: a minute that saves a submission."""
    from cwdm import inference
    from cwdm.images import MODALITIES

    inference.self_test(weights, [one.value for one in modality] if modality else MODALITIES, print_line)
