"""`cwdm weights`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cwdm.cli.app import Command
from cwdm.cli.old import REQUIRED, Word, either
from cwdm.cli.options import Modality, output
from cwdm.errors import SettingsError
from cwdm.progress import print_error, print_line, print_table, printable

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Download, list, convert and verify weights.")


@app.command(cls=Command)
def download(
    folder: Word = None,
    output_path: Annotated[Path | None, output("Where to put them. Default: where infer looks.")] = None,
    repo: Annotated[str, typer.Option(help="Hugging Face repository.")] = "pfriedri/cwdm",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    file: Annotated[
        list[str] | None, typer.Option(help="File in the repository; repeat for several. Default: the four of cWDM.")
    ] = None,
) -> None:
    """Fetch the published weights (4 × 326 MB) and record their checksums.

    The exit code is 1 if a file of yours is in the way and is kept.
    """
    from cwdm import weights

    target = either(output_path, folder, "--output_path", weights.default_folder())
    names, kept = tuple(file or weights.PUBLISHED_FILES.values()), list[str]()
    for path in weights.download(target, repo, revision, names, kept.append):
        print_line(path)
    for line in kept:
        print_error(line)
    if kept:
        raise typer.Exit(1)


@app.command("verify", hidden=True, cls=Command)
@app.command("list", cls=Command)
def list_weights(
    word: Word = None,
    place: Annotated[Path | None, typer.Option("--weights", help="Folder or file. Default: where infer looks.")] = None,
) -> None:
    """Load every file, compare its recorded checksum and show what it is.

    The exit code is 1 if a file is not as it should be.
    """
    from cwdm.weights import folder_of

    if not _show(folder_of(either(place, word, "--weights", folder_of(None)))):
        raise typer.Exit(1)


@app.command(cls=Command)
def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Published .pt or our .safetensors.")],
    file: Word = None,
    output_path: Annotated[Path | None, output(f"Folder for <modality>.safetensors. {REQUIRED}")] = None,
    modality: Annotated[Modality | None, typer.Option(help="What it synthesises, if the name does not tell.")] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Numbers of the file; float16 halves it.")
    ] = "float32",
) -> None:
    """Write a checkpoint as safetensors, with configuration, modality and recommended sampler in its header."""
    import torch

    from cwdm import weights
    from cwdm.files import check_writable

    if output_path:
        check_writable(output_path)
    name = modality or weights.modality_of(source) or source.stem
    target = either(output_path and output_path / f"{name}.safetensors", file, "--output_path")
    print_line(weights.convert(source, target, modality and modality.value, getattr(torch, dtype)))


@app.command(cls=Command)
def untrained(
    folder: Word = None,
    output_path: Annotated[Path | None, output(f"Where to put them. {REQUIRED}")] = None,
    width: Annotated[int, typer.Option(min=32, help="Channels of the first level; 64 is the published network.")] = 64,
) -> None:
    """Write untrained weights for every modality, to try a set-up or to time it: their images mean nothing."""
    from cwdm.checkpoint import Record
    from cwdm.unet import UNetConfig
    from cwdm.weights import write_untrained

    target = either(output_path, folder, "--output_path")
    try:
        config = UNetConfig(in_channels=32, model_channels=width)
    except ValueError as error:
        raise SettingsError(f"--width {width}: {error}") from error
    for path in write_untrained(target, config, Record()):
        print_line(path)


def _show(place: Path) -> bool:
    """Print a table of weights files; whether all of them are sound."""
    from rich.table import Table
    from rich.text import Text

    from cwdm.weights import inspect, modality_of

    marks: dict[bool | None, str] = {True: "as recorded", False: "DIFFERS", None: "none recorded"}
    table = Table("file", "synthesises", "network", "parameters", "checksum", title=Text(printable(str(place))))
    faults = []
    for listed in inspect(place):
        if listed.fault:
            faults.append(listed.fault)
        name = Text(printable(listed.path.name))
        if listed.loaded is None:
            table.add_row(name, "", "NOT USABLE", "", marks[listed.verified])
            continue
        config, entry = listed.loaded.model.config, listed.loaded.record
        kind = f"{config.skips} {config.model_channels}×{','.join(map(str, config.channel_mult))}"
        parameters = sum(tensor.numel() for tensor in listed.loaded.model.parameters())
        unconditional = config.in_channels == config.out_channels
        target = "volumes" if unconditional else entry.modality or modality_of(listed.path) or "not said"
        table.add_row(name, target, kind, f"{parameters:,}", marks[listed.verified])
    if not table.rows:
        faults.append(f"{place}: no weights files (.pt, .safetensors)")
    print_table(table)
    for fault in faults:
        print_error(fault)
    return not faults
