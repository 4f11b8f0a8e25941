"""Options that several commands share, and the rule for their names.

What is read is positional or --data_path; what is written is --output_path, always a folder; weights are --weights;
a count of things is --num-…. Underscores and hyphens are the same.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal

import typer

Device = Literal["auto", "cpu", "cuda"]
Modality = StrEnum("Modality", "t1n t1c t2w t2f")


def data(text: str) -> Any:
    """The option for a folder that is read."""
    return typer.Option("--data_path", help=text)


def output(text: str) -> Any:
    """The option for the folder that is written."""
    return typer.Option("--output_path", "--out", "-o", help=text)


def count(name: str, text: str, least: int = 1, most: int | None = None) -> Any:
    """The option for how many there should be of something."""
    return typer.Option(f"--num-{name}", min=least, max=most, help=text)


DeviceOption = Annotated[
    Device, typer.Option(help="The GPU if there is one (auto), the CPU, or the GPU and nothing else (cuda).")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Make again what is there already.")]
Copy = Annotated[bool, typer.Option("--copy", help="Copy the files instead of linking to them.")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings, such as seed=1 or sampler.steps=50, before those of a file."),
]
