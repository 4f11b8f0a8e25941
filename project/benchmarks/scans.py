"""How well raw scans come into the space of the networks and back.

    python scans.py SCANS CASES                      # all tables, three movements an image
    python scans.py SCANS CASES --only within --movements 20
    python scans.py SCANS CASES --only planted

SCANS holds studies with their skulls on (`MSL-*`: FLAIR, T1W, T2W, reference affines to FLAIR, a brain mask in a common
space) and one that is stripped (`TCGA-DU-7294-stripped`); CASES the latter as BraTS preprocessed it. Brain masks by
HD-BET are kept in --cache, as they take most of the time.

within: mean distance over the brain to the reference affine, as the headers stand and after known movements by up to
20 degrees and 30 mm. atlas: Dice and correlation with the preprocessed case. back: points and images there and back.
strip: HD-BET with one network against the reference masks. cost: seconds and memory for four contrasts. planted: what
the judge says of wrong registrations.
"""

import resource
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from rich.table import Table

from cwdm.images import Image, read_grid
from cwdm.phantoms import make_phantom
from cwdm.scans import Aligned, Head, align, bring_back, find_space, judge, strip, write_transforms
from cwdm.scans.align import compose
from cwdm.scans.itk import RAS_LPS, Matrix, read_transform, resample, resample_mask
from cwdm.scans.register import about, centre_of, prepare, quarter_turns, register

STUDIES = ("MSL-01-1", "MSL-01-2", "MSL-04-1", "MSL-12-1", "MSL-12-2")
FILES = {"t1n": "T1W", "t2w": "T2W", "t2f": "FLAIR"}
STRIPPED = {"t1n": "t1", "t1c": "t1c", "t2w": "t2", "t2f": "fla"}
TABLES = ("within", "atlas", "back", "strip", "cost", "planted")
CPU = torch.device("cpu")
SEED = 7
console = Console(width=170)


def main(
    scans: Path,
    cases: Path,
    only: Annotated[str, typer.Option(help=f"some of {','.join(TABLES)}")] = ",".join(TABLES),
    movements: int = 3,
    studies: str = ",".join(STUDIES),
    cache: Path = Path("/tmp/cwdm-scans-masks"),
) -> None:
    """Print the tables."""
    cache.mkdir(parents=True, exist_ok=True)
    chosen, names = only.split(","), studies.split(",")
    if "within" in chosen:
        console.print(within(scans, names, movements, cache))
    if "atlas" in chosen:
        console.print(atlas(scans, cases / "BraTS-TCGA-07294-000"))
    if "back" in chosen:
        console.print(back(scans))
    if "strip" in chosen:
        console.print(stripping(scans, names, cache))
    if "cost" in chosen:
        console.print(cost(scans / names[0]))
    if "planted" in chosen:
        planted(scans, names, cache)


def head(scans: Path, study: str, modality: str, cache: Path) -> Head:
    """An image with its brain by HD-BET, which is kept."""
    image = read_grid(scans / study / f"{FILES[modality]}.nii.gz")
    kept = cache / f"{study}-{FILES[modality]}.npy"
    if not kept.exists():
        np.save(kept, strip(image, CPU).mask)
    return Head(image, np.load(kept))


def dice(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> float:
    return float(2 * np.count_nonzero(first & second) / (np.count_nonzero(first) + np.count_nonzero(second)))


def distance_mm(first: Matrix, second: Matrix, image: Image, mask: npt.NDArray[np.bool_]) -> float:
    """Mean distance over the brain between where two movements take its points."""
    points = np.c_[np.argwhere(mask)[::97], np.ones(len(np.argwhere(mask)[::97]))]
    lps = RAS_LPS @ image.affine @ points.T
    return float(np.linalg.norm(((first - second) @ lps)[:3], axis=0).mean())


def movement(number: int, centre: npt.NDArray[np.float64], degrees: float = 20, mm: float = 30) -> Matrix:
    """A known movement about a centre: any axis and direction, angles and lengths up to the limits."""
    rng = np.random.default_rng([SEED, number])
    x, y, z = axis = _direction(rng)
    angle, cross = np.radians(rng.uniform(0, degrees)), np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    turn = np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * np.outer(axis, axis)
    matrix = about(turn, centre)
    matrix[:3, 3] += _direction(rng) * rng.uniform(0, mm)
    return matrix


def _direction(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    axis = rng.normal(size=3)
    return np.asarray(axis / np.linalg.norm(axis))


def moved(image: Image, matrix: Matrix) -> Image:
    """An image whose header says that the head was moved; no voxel is interpolated."""
    return image._replace(affine=RAS_LPS @ matrix @ RAS_LPS @ image.affine)


def within(scans: Path, studies: list[str], movements: int, cache: Path) -> Table:
    table = Table("study", "image", "headers alone", "as it is", "moved: mean", "worst", title="mm to the reference")
    for study in studies:
        fixed = head(scans, study, "t2f", cache)
        brain = prepare(*fixed)
        for modality in ("t1n", "t2w"):
            moving = head(scans, study, modality, cache)
            reference = read_transform(scans / study / f"{FILES[modality]}_to_FLAIR.txt")
            away = []
            for number in range(movements + 1):
                known = np.eye(4) if number == 0 else movement(number, centre_of(brain.mask))
                found = register(brain, prepare(moved(moving.image, known), moving.mask)).matrix
                away.append(distance_mm(found, known @ reference, *fixed))
            cells = (distance_mm(np.eye(4), reference, *fixed), away[0], np.mean(away[1:] or [np.nan]), max(away))
            table.add_row(study, modality, *(f"{value:.2f}" for value in cells))
    return table


def stripped_study(scans: Path) -> dict[str, Head]:
    folder = scans / "TCGA-DU-7294-stripped"
    images = {modality: read_grid(folder / f"{name}.nii.gz") for modality, name in STRIPPED.items()}
    return {
        modality: Head(image, read_grid(folder / f"mask_{STRIPPED[modality]}.nii.gz").volume > 0)
        for modality, image in images.items()
    }


def atlas(scans: Path, case: Path) -> Table:
    """Each native image against its counterpart in the case; see the columns."""
    heads = stripped_study(scans)
    given = {modality: read_grid(case / f"{case.name}-{modality}.nii.gz") for modality in heads}
    other = read_grid(scans / "TCGA-DU-7294-stripped" / "mask_brats.nii.gz").volume > 0
    aligned = align(heads)
    grid, brain = (aligned.space.shape, aligned.space.affine), given["t1c"].volume != 0
    ours = Image(aligned.volume("t1c"), aligned.space.affine, True)
    common = register(prepare(given["t1c"], brain), prepare(ours, aligned.brain)).matrix
    table = Table("image", "Dice", "Dice, moved", "Dice, other mask", "correlation", "moved", "direct", "apart, mm")
    table.title = (
        f"against {case.name}; 'moved': all by one common rigid movement of "
        f"{distance_mm(common, np.eye(4), given['t1c'], brain):.1f} mm; the other mask has a Dice of "
        f"{dice(other, brain):.3f} with the case's own images"
    )
    for modality, (image, mask) in heads.items():
        truth, together = given[modality].volume, aligned.matrices[modality] @ common
        direct = register(prepare(given[modality], brain), prepare(image, mask)).matrix
        masks = [resample_mask(mask, image.affine, *grid, matrix) for matrix in (aligned.matrices[modality], together)]
        volumes = [
            resample(image.volume, image.affine, *grid, matrix)
            for matrix in (aligned.matrices[modality], together, direct)
        ]
        apart = distance_mm(together, direct, given[modality], brain)
        overlaps = (dice(masks[0], brain), dice(masks[1], brain), dice(masks[1], other))
        correlations = (float(np.corrcoef(volume[brain], truth[brain])[0, 1]) for volume in volumes)
        table.add_row(modality, *(f"{value:.3f}" for value in (*overlaps, *correlations)), f"{apart:.2f}")
    return table


def back(scans: Path) -> Table:
    table = Table("image", "voxels, mm", "points, mm", "PSNR in the brain, dB", title="to the atlas and back")
    phantom = make_phantom([SEED, 1], shape=(200, 220, 180))
    volumes = {name: volume.astype(np.float32) for name, volume in phantom.volumes.items()}
    heads = {name: Head(Image(volume, phantom.affine, True), volume != 0) for name, volume in volumes.items()}
    known = movement(1, np.zeros(3))
    shift = np.eye(4)
    shift[:3, 3] = _centre(heads["t1n"]) - known[:3, :3] @ (RAS_LPS @ [*_middle_of_sri24(), 1])[:3] - known[:3, 3]
    matrices = dict.fromkeys(heads, shift @ known)
    space = find_space("sri24", heads["t1n"].image)
    add_back(table, "phantom", compose(space, "t1n", heads, matrices, {}, {}))
    add_back(table, "TCGA-DU-7294", align(stripped_study(scans)))
    return table


def _centre(head: Head) -> npt.NDArray[np.float64]:
    return np.asarray((RAS_LPS @ head.image.affine @ [*np.argwhere(head.mask).mean(0), 1])[:3])


def _middle_of_sri24() -> tuple[float, float, float]:
    return -119.5, 119.5, 77.0


def add_back(table: Table, name: str, aligned: Aligned) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = {path.stem: read_transform(path) for path in write_transforms(aligned, Path(folder), name)}
    for modality, (image, mask) in aligned.heads.items():
        there, again = files[f"{name}_from-{modality}_to-sri24"], files[f"{name}_from-sri24_to-{modality}"]
        points = distance_mm(again @ there, np.eye(4), image, mask)
        returned = bring_back(aligned.volume(modality), aligned, modality).volume
        inside = mask & (returned != 0)
        error = float(np.sqrt(np.mean(np.square(returned[inside] - image.volume[inside]))))
        peak = float(np.percentile(image.volume[mask], 99.9))
        spacing = "×".join(f"{mm:.2g}" for mm in np.linalg.norm(image.affine[:3, :3], axis=0))
        table.add_row(f"{name} {modality}", spacing, f"{points:.1e}", f"{20 * np.log10(peak / error):.1f}")


def stripping(scans: Path, studies: list[str], cache: Path) -> Table:
    table = Table("study", "Dice of FLAIR with the reference mask", "ml", title="HD-BET, one network, no mirroring")
    for study in studies:
        flair = head(scans, study, "t2f", cache)
        common = read_grid(scans / study / "common_brainmask.nii.gz")
        to_common = np.linalg.inv(read_transform(scans / study / "FLAIR_to_common.txt"))
        truth = resample_mask(common.volume > 0, common.affine, flair.mask.shape, flair.image.affine, to_common)
        table.add_row(study, f"{dice(flair.mask, truth):.3f}", f"{flair.brain_ml:.0f}")
    return table


def cost(study: Path) -> Table:
    """Four contrasts with the skull on; the fourth is T1 once more."""
    start, cpu = time.perf_counter(), time.process_time()
    table = Table("stage", "s", "CPU s", "GB so far", title=f"four contrasts, {torch.get_num_threads()} threads")

    def row(stage: str) -> None:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        times = (time.perf_counter() - start, time.process_time() - cpu, memory)
        table.add_row(stage, *(f"{value:.1f}" for value in times))

    images = {modality: read_grid(study / f"{name}.nii.gz") for modality, name in {**FILES, "t1c": "T1W"}.items()}
    heads = {modality: Head(image, strip(image, CPU).mask) for modality, image in images.items()}
    row("stripped")
    aligned = align(heads)
    row("registered")
    for modality in heads:
        aligned.volume(modality)
    row("in the space")
    judge(aligned)
    row("judged")
    return table


def planted(scans: Path, studies: list[str], cache: Path) -> None:
    """What the judge says of wrong registrations, a line each as it is known."""
    for study in studies:
        other = STUDIES[(STUDIES.index(study) + 2) % len(STUDIES)]  # never the same patient
        heads = {modality: head(scans, study, modality, cache) for modality in FILES}
        for name, aligned in wrong_ones(heads, head(scans, other, "t2f", cache)):
            found = judge(aligned)
            console.print(f"{study}  {name:36s} {found.verdict:7s} {'; '.join(found.reasons[:2])}")


def wrong_ones(heads: Mapping[str, Head], other: Head) -> Iterator[tuple[str, Aligned]]:
    """A name and a patient that went wrong in that way."""
    sound = align(heads)
    yield "nothing", sound
    centre = centre_of(sound.brains["t2f"].mask)
    for number, turn in enumerate(quarter_turns()):
        if number % 12 == 0:
            yield f"FLAIR turned, number {number}", with_matrix(sound, "t2f", about(turn, centre))
            yield f"all turned, number {number}", all_with(sound, about(turn, centre_of_space(sound)))
    for degrees, mm in ((10, 0.0), (0, 5.0), (0, 10.0)):
        small = movement(3, centre, 0, 0)
        small[:3, :3] = about(_tilt(degrees), centre)[:3, :3]
        small[:3, 3] = about(_tilt(degrees), centre)[:3, 3] + [mm, 0, 0]
        yield f"FLAIR off by {degrees} degrees, {mm:g} mm", with_matrix(sound, "t2f", small)
    flair = heads["t2f"]
    flipped = Head(flair.image._replace(volume=flair.image.volume[::-1]), flair.mask[::-1])
    yield "FLAIR mirrored left to right", align({**heads, "t2f": flipped})
    mirrored = {
        name: Head(image._replace(volume=image.volume[::-1]), mask[::-1]) for name, (image, mask) in heads.items()
    }
    yield "all mirrored left to right", align(mirrored)
    yield "another patient's FLAIR", align({**heads, "t2f": other})
    half = flair.mask.shape[2] // 2
    cut = flair.image._replace(volume=flair.image.volume[:, :, :half])
    yield "FLAIR ends halfway up", align({**heads, "t2f": Head(cut, flair.mask[:, :, :half])})
    side = np.arange(flair.mask.shape[0])[:, None, None] < flair.mask.shape[0] // 2
    yield "half of FLAIR's brain is stripped", align({**heads, "t2f": Head(flair.image, flair.mask & side)})


def with_matrix(aligned: Aligned, modality: str, change: Matrix) -> Aligned:
    return all_with(aligned, change, (modality,), after=True)


def all_with(aligned: Aligned, change: Matrix, which: tuple[str, ...] = (), after: bool = False) -> Aligned:
    matrices = {
        name: matrix if which and name not in which else change @ matrix if after else matrix @ change
        for name, matrix in aligned.matrices.items()
    }
    return compose(aligned.space, aligned.reference, aligned.heads, matrices, aligned.brains, aligned.registrations)


def centre_of_space(aligned: Aligned) -> npt.NDArray[np.float64]:
    assert aligned.space.atlas is not None
    return centre_of(aligned.space.atlas.mask)


def _tilt(degrees: float) -> npt.NDArray[np.float64]:
    angle = np.radians(degrees)
    return np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])


if __name__ == "__main__":
    typer.run(main)
