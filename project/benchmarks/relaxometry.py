"""How well do the signal equations explain real patients, and what do patients look like that are imaged anew?

    python relaxometry.py CASES [--picture anew.png]

CASES is a folder of cases with t1n, t2w, t2f and perhaps t1c. The table gives, for each contrast, the timings that were
believed, and the correlation in the brain with the original: of what the equations alone say, and of the image with
what they do not explain, both with the original's timings and bias. The picture shows an axial slice of each case, the
original above two new ones.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from cwdm.arrays import Volume
from cwdm.images import MODALITIES, find_cases, read_grid, to_lps
from cwdm.phantoms import Maps, estimate, image_anew

ROWS = 3


def main(cases: Path, picture: Annotated[Path | None, typer.Option(help="Image to draw.")] = None) -> None:
    """Print the table, and draw the picture."""
    table = Table("case", "contrast", "TR, TE, TI in ms", "equations alone", "with what they do not explain")
    folders = find_cases(cases)
    figure = Figure(figsize=(8, 7.2 * len(folders)), facecolor="black")
    grid = figure.subplots(ROWS * len(folders), len(MODALITIES), squeeze=False)
    for axes in grid.ravel():
        axes.axis("off")
    for number, case in enumerate(folders):
        volumes, spacing_mm = {}, [1.0] * 3
        for modality in (modality for modality in MODALITIES if modality in case.files):
            image = read_grid(case.files[modality])
            volumes[modality] = to_lps(image.affine, image.oriented).apply(image.volume)
            spacing_mm = np.linalg.norm(image.affine[:3, :3], axis=0).tolist()
        maps = estimate(volumes, spacing_mm)
        for modality, volume in volumes.items():
            table.add_row(case.name, modality, *row(maps, modality, volume))
        shown = [volumes, *(image_anew(maps, spacing_mm, [0, i]) for i in range(1, ROWS))]
        level = round(np.argwhere(maps.mask)[:, 2].mean())
        for line, images in enumerate(shown):
            for axes, modality in zip(grid[ROWS * number + line], MODALITIES, strict=True):
                if modality in images:
                    brightest = np.quantile(images[modality][maps.mask], 0.995)
                    axes.imshow(images[modality][:, :, level].T, cmap="gray", vmin=0, vmax=brightest)
    Console(width=120).print(table)
    if picture:
        figure.subplots_adjust(0, 0, 1, 1, 0.01, 0.01)
        figure.savefig(picture, dpi=100)


def row(maps: Maps, modality: str, volume: Volume) -> list[str]:
    timing, original = maps.timings[modality], volume[maps.mask]
    images = [maps.explained(modality, timing), maps.signal(modality, timing)]
    found = [np.corrcoef(image * maps.bias[modality], original)[0, 1] for image in images]
    times = ", ".join(f"{ms:.0f}" for ms in (timing.tr, timing.te, timing.ti) if ms is not None)
    return [times, *(f"{correlation:.3f}" for correlation in found)]


if __name__ == "__main__":
    typer.run(main)
