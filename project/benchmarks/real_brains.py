"""What weights are worth on real brains: from whatever is given, and from images that are worse than they should be.

    python real_brains.py given CASE [CASE ...]    # every target from one, two and three of the others
    python real_brains.py worse CASE [CASE ...]    # one of three inputs moved by 1, 2, 4 mm, or in slices of 3, 5 mm
    python real_brains.py own CASE [CASE ...]      # what a regression that was fitted to the truth itself reaches

A CASE is the folder of a real case with all four modalities, none of whose images the weights were trained on
(`--weights`; `recipes/bundled.py train --without` leaves a patient out). Metrics are those of `bundled.py compare`:
inside the brain, each image on [0, 1] by its own percentiles, as evaluators see it; PSNR as it comes and after the
scale and offset that fit it to the truth, SSIM as it comes. "copy" is the best of the given modalities by the number in
question. Of a network that predicts its standard deviation, the rank correlation with the size of the error over the
brain's voxels, and the share of these whose truth lies within one standard deviation.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations, combinations_with_replacement
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from bundled import print_hardware, scored, shown
from rich.console import Console
from rich.table import Table

from cwdm import Synthesizer
from cwdm.arrays import Affine, Mask, Volume
from cwdm.calibration import coverage, rank_correlation
from cwdm.images import MODALITIES, case_folder, normalise, read_grid
from cwdm.training import distort
from cwdm.weights import BUNDLED

MOVES_MM, SLICES_MM = (0.0, 1.0, 2.0, 4.0), (3.0, 5.0)
EVERY = 7
"""Of the voxels that ranks are taken from."""

app = typer.Typer(help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)
Cases = Annotated[list[Path], typer.Argument(help="Folders of complete real cases.")]


class Patient(NamedTuple):
    """The images of a case, all (X, Y, Z), and these on [0, 1]."""

    name: str
    affine: Affine
    volumes: dict[str, Volume]
    units: dict[str, Volume]


class Score(NamedTuple):
    """Of one image; NaN where the network does not predict a standard deviation."""

    psnr: float
    fitted: float
    ssim: float
    correlation: float = np.nan
    coverage: float = np.nan


@app.command()
def given(
    cases: Cases,
    weights: str = BUNDLED,
    least: Annotated[int, typer.Option(help="Fewest images to give; 3 for networks that need all.")] = 1,
) -> None:
    """A row a target and number of images that are given, the mean over all patients and sets of these."""
    print_hardware()
    synthesizer, patients = Synthesizer(weights, device="cpu"), [read(path) for path in cases]
    scores: dict[tuple[str, int], list[tuple[Score, Score]]] = defaultdict(list)
    jobs = [(p, target, some) for p in patients for target in MODALITIES for some in sets_without(target, least)]
    for patient, target, some in shown(jobs, "images"):
        images = {name: patient.volumes[name] for name in some}
        network = synthesised(synthesizer, patient, images, target)
        scores[target, len(some)].append((network, copied(patient, some, target)))
    columns = ("PSNR (copy)", "fitted (copy)", "SSIM (copy)", "rank corr.", "within 1 std", "wins")
    table = Table("target", "given", *columns)
    for count in range(3, least - 1, -1):
        for target in MODALITIES:
            add_row(table, target, count, scores[target, count])
        add_row(table, "all", count, [pair for target in MODALITIES for pair in scores[target, count]])
    print(f"{', '.join(patient.name for patient in patients)}; weights {weights}")
    Console(width=110).print(table)


@app.command()
def worse(cases: Cases, weights: str = BUNDLED) -> None:
    """A row a distortion, each of the three given images distorted in turn; means over patients and targets."""
    print_hardware()
    synthesizer, patients = Synthesizer(weights, device="cpu"), [read(path) for path in cases]
    table = Table("one input", "PSNR", "fitted", "SSIM", "loss after the fit")
    ways = [*(("moved", mm) for mm in MOVES_MM), *(("slices", mm) for mm in SLICES_MM)]
    first: Score | None = None
    for way, mm in shown(ways, "distortions"):
        scores = [
            synthesised(synthesizer, patient, distorted(patient, target, victim, way, mm), target)
            for patient in patients
            for target in MODALITIES
            for victim in MODALITIES
            if victim != target and (mm or victim == first_other(target))
        ]
        mean = Score(*np.mean(scores, axis=0))
        first = first or mean
        label = f"{way} by {mm:g} mm" if way == "moved" else f"{way} of {mm:g} mm"
        loss = f"{first.fitted - mean.fitted:.2f} dB"
        table.add_row(label, f"{mean.psnr:.2f}", f"{mean.fitted:.2f}", f"{mean.ssim:.3f}", loss)
    print(f"{', '.join(patient.name for patient in patients)}; weights {weights}")
    Console(width=110).print(table)


def read(path: Path) -> Patient:
    files = case_folder(path).files
    grids = {name: read_grid(files[name]) for name in MODALITIES}
    volumes = {name: grid.volume for name, grid in grids.items()}
    return Patient(
        path.name, grids["t1n"].affine, volumes, {name: normalise(volume)[0] for name, volume in volumes.items()}
    )


@app.command()
def own(cases: Cases) -> None:
    """A row a patient and target: polynomials of the three others in the same voxel, fitted to the truth itself."""
    degrees = {"linear": 1, "quadratic": 2, "cubic": 3}
    table = Table("patient", "target", *degrees)
    for patient in shown([read(path) for path in cases], "patients"):
        rows = []
        for target in MODALITIES:
            others = [patient.units[name] for name in MODALITIES if name != target]
            mask, truth = brain(others), patient.units[target]
            scores = [scored(polynomial(others, truth, mask, degree), truth, mask) for degree in degrees.values()]
            rows.append([(score, likeness) for score, _, likeness in scores])
            table.add_row(patient.name, target, *(f"{a:.2f} dB, {b:.3f}" for a, b in rows[-1]))
        table.add_row("", "all", *(f"{a:.2f} dB, {b:.3f}" for a, b in np.mean(rows, axis=0)), end_section=True)
    Console(width=110).print(table)


def polynomial(images: Sequence[Volume], truth: Volume, mask: Mask, degree: int) -> Volume:
    """The least-squares polynomial of the images' intensities in a voxel."""
    values = np.stack([image[mask] for image in images]).astype(np.float64)
    terms = [some for n in range(1, degree + 1) for some in combinations_with_replacement(range(len(images)), n)]
    features = np.stack([np.ones(values.shape[1]), *(values[list(some)].prod(0) for some in terms)], axis=1)
    weights = np.linalg.lstsq(features[::EVERY], truth[mask][::EVERY], rcond=None)[0]
    volume = np.zeros_like(truth)
    volume[mask] = features @ weights
    return volume


def sets_without(target: str, least: int) -> Iterable[tuple[str, ...]]:
    others = [name for name in MODALITIES if name != target]
    return (some for count in range(least, 4) for some in combinations(others, count))


def first_other(target: str) -> str:
    return next(name for name in MODALITIES if name != target)


def synthesised(synthesizer: Synthesizer, patient: Patient, images: dict[str, Volume], target: str) -> Score:
    """Of the network's image of the target."""
    made = synthesizer.from_arrays(images, patient.affine, target=target)
    mask, truth = brain(images.values()), patient.units[target]
    unit, (low, high) = normalise(made.volume)
    score = Score(*scored(unit, truth, mask))
    if made.std is None:
        return score
    error, std = (unit - truth)[mask], made.std[mask] / (high - low)
    return score._replace(correlation=rank_correlation(error[::EVERY], std[::EVERY]), coverage=coverage(error, std))


def copied(patient: Patient, some: Sequence[str], target: str) -> Score:
    """The best of each number that copying one of the given images reaches."""
    mask, truth = brain(patient.volumes[name] for name in some), patient.units[target]
    return Score(*np.max([scored(patient.units[name], truth, mask) for name in some], axis=0))


def brain(volumes: Iterable[Volume]) -> Mask:
    return np.any([volume > 0 for volume in volumes], axis=0)


def distorted(patient: Patient, target: str, victim: str, way: str, mm: float) -> dict[str, Volume]:
    """The other three images, one of them moved along a diagonal or resampled from slices along z."""
    images = {name: volume for name, volume in patient.volumes.items() if name != target}
    spacing_mm = np.linalg.norm(patient.affine[:3, :3], axis=0)
    mask, filled = images[victim] > 0, distort.filled(images[victim], images[victim] > 0)
    if way == "moved":
        new = distort.moved(filled, (0, 0, 0), np.full(3, mm / 3**0.5), spacing_mm)
    else:
        new = distort.thick_slices(filled, 2, mm, spacing_mm[2], 0.5)
    return {**images, victim: np.where(mask, np.maximum(new, 1e-3), 0).astype(np.float32)}


def add_row(table: Table, target: str, count: int, pairs: Sequence[tuple[Score, Score]]) -> None:
    network, copy = (Score(*np.mean(scores, axis=0)) for scores in zip(*pairs, strict=True))
    wins = sum(own.fitted > other.fitted and own.ssim > other.ssim for own, other in pairs)
    table.add_row(
        target,
        str(count),
        f"{network.psnr:.2f} ({copy.psnr:.2f})",
        f"{network.fitted:.2f} ({copy.fitted:.2f})",
        f"{network.ssim:.3f} ({copy.ssim:.3f})",
        f"{network.correlation:.2f}",
        f"{network.coverage:.2f}",
        f"{wins} of {len(pairs)}",
        end_section=target == "all",
    )


if __name__ == "__main__":
    app()
