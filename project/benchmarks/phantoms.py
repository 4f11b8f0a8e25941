"""How like patients are the phantoms? Correlations between modalities in the brain, and a picture.

    python phantoms.py --picture phantoms.png                 # six phantoms
    python phantoms.py CASES --picture phantoms.png           # beside the complete cases of a folder

A row a case: Pearson's correlation of each pair of modalities over the voxels of the brain, each modality clipped at
its own 0.1 and 99.9 percentiles as networks are trained on it; then the share of the variance of a modality that the
best linear combination of the other three explains, and the seconds that a phantom took to make. The picture shows an
axial slice of the four modalities through the tumour where there is a segmentation, else through the middle, then two
coronal and two sagittal ones.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cwdm.images import MODALITIES, Orientation, brain_mask, find_cases, normalise, read_grid
from cwdm.phantoms import WIDE, make_phantom

SEED = 5005
PAIRS = tuple(combinations(MODALITIES, 2))
VIEWS = (*((modality, 2) for modality in MODALITIES), ("t1c", 1), ("t2w", 1), ("t1n", 0), ("t2f", 0))


@dataclass(frozen=True)
class Head:
    """One case: modalities on [0, 1] and the brain, (X, Y, Z) in LPS, where to cut, seconds it took to make."""

    name: str
    units: dict[str, NDArray[np.float32]]
    mask: NDArray[np.bool_]
    cut: tuple[int, ...]
    seconds: float | None = None


def main(
    cases: Annotated[Path | None, typer.Argument(help="Folder of complete cases to stand beside the phantoms.")] = None,
    phantoms: int = 6,
    wide: Annotated[bool, typer.Option(help="Phantoms that differ more than patients do.")] = False,
    picture: Annotated[Path | None, typer.Option(help="PNG to draw.")] = None,
) -> None:
    """Print the table, and draw the picture."""
    heads = [] if cases is None else list(patients(cases))
    heads += track(synthetic(phantoms, wide), "phantoms", phantoms, console=Console(stderr=True))
    Console(width=170).print(table(heads))
    if picture:
        draw(picture, heads)


def patients(folder: Path) -> Iterator[Head]:
    for case in find_cases(folder):
        volumes = {}
        for modality in MODALITIES:
            volume, affine, _ = read_grid(case.files[modality])
            volumes[modality] = Orientation.to("LPS", affine).apply(volume)
        seg = case.folder / f"{case.name}-seg.nii.gz"
        tumour = Orientation.to("LPS", affine).apply(read_grid(seg)[0]) > 0 if seg.exists() else None
        yield head(case.name, volumes, tumour)


def synthetic(number: int, wide: bool) -> Iterator[Head]:
    for index in range(number):
        start = time.perf_counter()
        made = make_phantom([SEED, index], variation=WIDE if wide else None)
        seconds = time.perf_counter() - start
        volumes = {name: volume.astype(np.float32) for name, volume in made.volumes.items()}
        yield head(f"phantom {index}", volumes, made.seg > 0, seconds)


def head(
    name: str,
    volumes: dict[str, NDArray[np.float32]],
    tumour: NDArray[np.bool_] | None,
    seconds: float | None = None,
) -> Head:
    mask = brain_mask(volumes.values())
    middle = np.argwhere(mask if tumour is None else tumour).mean(0)
    units = {modality: normalise(volume)[0] for modality, volume in volumes.items()}
    return Head(name, units, mask, tuple(round(m) for m in middle), seconds)


def table(heads: list[Head]) -> Table:
    explained = (f"{modality} explained" for modality in MODALITIES)
    result = Table("case", *(f"{a}–{b}" for a, b in PAIRS), *explained, "seconds")
    rows: dict[bool, list[list[float]]] = {False: [], True: []}
    for one in heads:
        correlation = np.corrcoef([one.units[modality][one.mask] for modality in MODALITIES])
        values = [correlation[MODALITIES.index(a), MODALITIES.index(b)] for a, b in PAIRS]
        values += (1 - 1 / np.diag(np.linalg.inv(correlation))).tolist()
        rows[one.seconds is not None].append(values)
        seconds = "" if one.seconds is None else f"{one.seconds:.1f}"
        result.add_row(one.name, *(f"{value:.2f}" for value in values), seconds)
    for made, name in ((False, "mean of the cases"), (True, "mean of the phantoms")):
        if rows[made]:
            result.add_section()
            result.add_row(name, *(f"{value:.2f}" for value in np.mean(rows[made], axis=0)))
    return result


def draw(path: Path, heads: list[Head]) -> None:
    figure = Figure(figsize=(2 * len(VIEWS), 2.2 * len(heads)), facecolor="black")
    grid = figure.subplots(len(heads), len(VIEWS), squeeze=False)
    for row, one in zip(grid, heads, strict=True):
        box = tuple(slice(k.min(), k.max() + 1) for k in np.nonzero(one.mask))
        for axes, (modality, axis) in zip(row, VIEWS, strict=True):
            index = [*box]
            index[axis] = one.cut[axis]
            pixels = one.units[modality][tuple(index)].T
            axes.imshow(pixels[:: -1 if axis < 2 else 1], cmap="gray", vmin=0, vmax=1)
            axes.set_title(f"{one.name} {modality}", color="white", fontsize=6)
            axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 0.99, 0.02, 0.06)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    typer.run(main)
