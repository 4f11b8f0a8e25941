"""`cwdm train`."""

from pathlib import Path
from typing import Annotated

import typer

from cwdm.cli.options import data, output
from cwdm.errors import SettingsError, needs_extra
from cwdm.progress import print_line
from cwdm.temporary import check_temporary


def train(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A ready configuration, such as cwdm-t1n, or a YAML file.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that override it, such as optimiser.batch_size=8."),
    ] = None,
    data_path: Annotated[Path | None, data("Folder of the training data, the same as data.path=FOLDER.")] = None,
    output_path: Annotated[Path | None, output("Folder of the run, the same as out=FOLDER.")] = None,
    parameters_file: Annotated[Path | None, typer.Option("--parameters_file", hidden=True)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest state in the run's folder.")] = False,
) -> None:
    """Train a network.

    Ready for one modality or any: cwdm-t1n, cwdm-t1c, cwdm-t2w, cwdm-t2f, cwdm-any.
    Ready for whole volumes: wdm-unet-128, wdm-unet-256, wdm-wavunet-128, wdm-wavunet-256.
    The small weights that come with cwdm: bundled.

    Several GPUs: devices=8. Several machines: start it with torchrun or Slurm.
    A stopped run goes on with --resume.
    """
    from cwdm import training

    words = [str(word) for word in (parameters_file, config, *(settings or ())) if word]
    if not words:
        raise SettingsError("expected a configuration, found none; --help names those that are ready")
    folders = {"data.path": data_path, "out": output_path}
    named = [f"{key}={value}" for key, value in folders.items() if value is not None]
    loaded = training.load_training_settings(words[0], [*named, *words[1:]])
    check_temporary()  # which PyTorch's compiler needs when it is imported, and readers later
    with needs_extra("train", "what training needs"):
        run = training.train  # imports what it is made with
    print_line(run(loaded, resume))
