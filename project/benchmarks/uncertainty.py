"""How well the standard deviation of several samples, or of one pass, tells where a synthesis is wrong.

    python uncertainty.py calibration.png                        # four phantoms, eight samples, the bundled weights
    python uncertainty.py calibration.png --weights DIR sampler.name=ddpm sampler.steps=250

For each modality of each phantom, in a cube around the tumour: Spearman's rank correlation of the deviation with the
absolute error of the mean (0: it tells nothing, 1: it ranks every voxel), the share of the errors that are within one
deviation (0.68 where it is calibrated), the deviation itself, and the error. The picture is the calibration: root mean
square error in each tenth of the voxels, ranked by deviation, against the deviation of these voxels. On the diagonal it
is as large as the error; above it, the samples agree on what is wrong.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cwdm import Synthesizer
from cwdm.calibration import coverage, rank_correlation
from cwdm.checkpoint import read_record
from cwdm.images import MODALITIES, case_folder, normalise, output_name, read_case, read_grid
from cwdm.phantoms import write_phantoms
from cwdm.settings import load_settings
from cwdm.weights import BUNDLED, find, folder_of

SEED = 5005
TENTHS = 10


@dataclass(frozen=True)
class Measured:
    """Voxels of the brain inside the cube, in the network's [0, 1]: standard deviation, absolute error of the mean."""

    modality: str
    std: npt.NDArray[np.float32]
    error: npt.NDArray[np.float32]


def main(
    picture: Annotated[Path, typer.Argument(help="PNG of the calibration.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    cases: int = 4,
    samples: Annotated[int, typer.Option(min=2)] = 8,
    size: Annotated[int, typer.Option(help="Edge of the cube in voxels.")] = 64,
    weights: str = BUNDLED,
) -> None:
    """Print the table and draw the calibration."""
    one_pass = read_record(find(folder_of(weights), MODALITIES[0])).one_pass
    sampled = [f"samples={samples}", *(settings or ("sampler.name=ddim", "sampler.steps=5"))]
    chosen = (settings or []) if one_pass else sampled
    synthesizer = Synthesizer(weights, load_settings(None, chosen))
    with TemporaryDirectory() as folder:
        paths = write_phantoms(Path(folder), cases, SEED)
        todo = [(path, modality) for path in paths for modality in MODALITIES]
        console = Console(stderr=True)
        measured = [_measure(synthesizer, *item, size) for item in track(todo, "modalities", console=console)]
    Console().print(_table(measured, f"{cases} phantoms, {' '.join(chosen) or 'one pass'}"))
    _draw(picture, measured)


def _measure(synthesizer: Synthesizer, path: Path, modality: str, size: int) -> Measured:
    folder = case_folder(path)
    others = {name: file for name, file in folder.files.items() if name != modality}
    prepared = synthesizer.prepare(read_case(replace(folder, files=others)))

    def inside(volume: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        return prepared.window.crop(prepared.orientation.apply(volume))

    tumour = inside(read_grid(path / output_name(path.name, "seg"))[0]) != 0
    cube = _cube(tumour, size)
    truth = inside(normalise(read_grid(folder.files[modality])[0], prepared.intensities)[0])[cube]
    drawn = synthesizer.sample(replace(prepared, unit=prepared.unit[(..., *cube)]))
    brain = inside(prepared.mask)[cube]
    assert drawn.std is not None
    return Measured(modality, drawn.std.numpy()[brain], np.abs(drawn.mean.numpy() - truth)[brain])


def _cube(tumour: npt.NDArray[np.bool_], size: int) -> tuple[slice, ...]:
    middle = np.argwhere(tumour).mean(axis=0)
    starts = (int(np.clip(m - size // 2, 0, n - size)) for m, n in zip(middle, tumour.shape, strict=True))
    return tuple(slice(start, start + size) for start in starts)


def _table(measured: list[Measured], title: str) -> Table:
    names = "modality", "rank correlation", "lowest to highest", "within one", "median deviation", "median error"
    table = Table(*names, title=title)
    for modality in (*MODALITIES, "all"):
        rows = [one for one in measured if modality in ("all", one.modality)]
        ranks = [rank_correlation(one.error, one.std) for one in rows]
        within = np.mean([coverage(one.error, one.std) for one in rows])
        std, error = (np.median(np.concatenate([getattr(one, name) for one in rows])) for name in ("std", "error"))
        limits = f"{min(ranks):.2f} to {max(ranks):.2f}"
        table.add_row(modality, f"{np.mean(ranks):.2f}", limits, f"{within:.0%}", f"{std:.4f}", f"{error:.4f}")
    return table


def _calibration(measured: list[Measured]) -> Iterator[tuple[str, list[float], list[float]]]:
    """For each modality, root mean squares of deviation and of error in each tenth of the voxels, by deviation."""
    for modality in MODALITIES:
        rows = [one for one in measured if one.modality == modality]
        std, error = (np.concatenate([getattr(one, name) for one in rows]) for name in ("std", "error"))
        tenths = np.array_split(np.argsort(std), TENTHS)
        yield (
            modality,
            [float(np.sqrt(np.mean(np.square(std[tenth])))) for tenth in tenths],
            [float(np.sqrt(np.mean(np.square(error[tenth])))) for tenth in tenths],
        )


def _draw(path: Path, measured: list[Measured]) -> None:
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    for modality, std, error in _calibration(measured):
        axes.plot(std, error, marker="o", markersize=4, label=modality)
    low, high = min(*axes.get_xlim(), *axes.get_ylim()), max(*axes.get_xlim(), *axes.get_ylim())
    low = max(low, 1e-4)
    axes.plot([low, high], [low, high], color="grey", linestyle="--", linewidth=1, label="as large as the error")
    axes.set(xscale="log", yscale="log", xlabel="standard deviation", ylabel="root mean square error")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
