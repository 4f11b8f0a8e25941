"""Pictures, because people would rather look than read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from cwdm.files import write_atomically

Volume = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Comparison:
    """What is shown of one case: volumes (X, Y, Z) in [0, 1], stored LPS.

    Attributes:
        conditions: name -> volume.
        caption: a line about the figures of merit.
        slice_index: the axial slice to show.
    """

    name: str
    conditions: Mapping[str, Volume]
    target: str
    synthesis: Volume
    truth: Volume
    caption: str
    slice_index: int


def draw_comparisons(path: Path, comparisons: Sequence[Comparison], title: str) -> None:
    """Write a PNG with a row a case: conditions, synthesis, truth and their absolute difference."""
    figure = Figure(figsize=(15, 3.3 * len(comparisons) + 0.8), facecolor="black", layout="constrained")
    figure.suptitle(title, color="white", fontsize=14)
    axes = figure.subplots(len(comparisons), 6, squeeze=False)
    for row, comparison in zip(axes, comparisons, strict=True):
        difference = np.abs(comparison.synthesis - comparison.truth)
        box = _around(comparison.truth[:, :, comparison.slice_index])
        images = {
            **comparison.conditions,
            f"{comparison.target}, synthesised": comparison.synthesis,
            f"{comparison.target}, truth": comparison.truth,
            "|difference|": difference,
        }
        for axis, (label, volume) in zip(row, images.items(), strict=True):
            colours = "magma" if volume is difference else "gray"
            axis.imshow(volume[*box, comparison.slice_index].T, cmap=colours, vmin=0, vmax=1)
            axis.set_title(label, color="white", fontsize=10)
            axis.axis("off")
        row[3].text(
            0.5, -0.04, comparison.caption, color="white", fontsize=9, ha="center", va="top", transform=row[3].transAxes
        )
        row[0].text(
            0.0, -0.04, comparison.name, color="white", fontsize=9, ha="left", va="top", transform=row[0].transAxes
        )

    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))


def _around(image: Volume, margin: int = 4) -> tuple[slice, slice]:
    """The part of a slice (X, Y) that is not background, with a margin."""
    occupied = np.argwhere(image) if image.any() else np.argwhere(image == 0)
    (x, y), (last_x, last_y) = np.maximum(occupied.min(axis=0) - margin, 0), occupied.max(axis=0) + margin
    return slice(x, last_x + 1), slice(y, last_y + 1)
