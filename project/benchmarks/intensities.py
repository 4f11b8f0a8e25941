"""What an image's scale is worth before anything is trained: published percentiles against the brain's.

    python intensities.py CASES [CASES ...]     # folders of complete real cases, a patient a folder; three minutes

Each modality is made by copying the nearest one and by a regression on the other three (linear, and with squares and
products), fitted on the other patients, under both settings of `intensities`. Metrics are those of `bundled.py
compare`: inside the brain, on [0, 1] by the true image's own percentiles; PSNR as it comes, PSNR when the prediction is
put on [0, 1] by its own percentiles, as evaluators do, PSNR after the scale and offset that fit it to the truth, SSIM.
"ceiling" is the true image itself, scaled without knowing its brightest voxels: what the scale alone costs.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from cwdm.arrays import bounding_box
from cwdm.images import MODALITIES, MOST_SIMILAR, as_published, brain_mask, find_cases, normalise, read_grid
from cwdm.metrics import psnr, ssim

FIT_EVERY, BRATS_VOXELS = 20, 240 * 240 * 155
SETTINGS = ("published", "brain")
METHODS = ("ceiling", "nearest", "linear", "quadratic")


class Patient(NamedTuple):
    """A case: the brain, the true images by their percentiles, and what each setting makes of them."""

    name: str
    mask: np.ndarray
    truth: dict[str, np.ndarray]
    units: dict[str, dict[str, np.ndarray]]


def main(cases: list[Path]) -> None:
    """A table of means over patients and modalities, and one a modality."""
    patients = [read(folder) for root in cases for folder in find_cases(root) if len(folder.files) == len(MODALITIES)]
    scores: dict[tuple[str, str, str], list[Sequence[float]]] = defaultdict(list)
    for patient in patients:
        others = [other for other in patients if other is not patient]
        for setting in SETTINGS:
            for target in MODALITIES:
                for method, prediction in predictions(patient, others, setting, target).items():
                    scores[setting, method, target].append(score(prediction, patient.truth[target], patient.mask))
    columns = ("", "intensities", "PSNR", "by own percentiles", "after scale, offset", "SSIM")
    for targets in (MODALITIES, *((name,) for name in MODALITIES)):
        table = Table(*columns, title=f"{', '.join(targets)}; {len(patients)} patients")
        for method in METHODS:
            for setting in SETTINGS:
                a, b, c, d = np.mean([row for target in targets for row in scores[setting, method, target]], axis=0)
                table.add_row(method, setting, f"{a:.2f}", f"{b:.2f}", f"{c:.2f}", f"{d:.3f}")
        Console(width=100).print(table)


def read(folder: Any) -> Patient:
    volumes = {name: read_grid(path).volume for name, path in folder.files.items()}
    mask = brain_mask(volumes.values())
    box = bounding_box(mask, 6)
    units = {
        setting: {name: normalise(volume, setting)[0][box] for name, volume in volumes.items()} for setting in SETTINGS
    }
    return Patient(folder.name, mask[box], units["published"], units)


def predictions(patient: Patient, others: list[Patient], setting: str, target: str) -> dict[str, np.ndarray]:
    """Method -> image in the units of the truth."""
    given = [name for name in MODALITIES if name != target]
    unit = patient.units[setting]
    nearest = as_published(unit[MOST_SIMILAR[target]], MOST_SIMILAR[target], setting)
    made = {}
    for method, features in (("linear", linear), ("quadratic", quadratic)):
        rows = [features([p.units[setting][n][p.mask][::FIT_EVERY] for n in given]) for p in others]
        wanted = [p.units[setting][target][p.mask][::FIT_EVERY] for p in others]
        weights = np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted), rcond=None)[0]
        made[method] = np.zeros_like(unit[target])
        made[method][patient.mask] = features([unit[n][patient.mask] for n in given]) @ weights
    regressions = {method: as_published(volume, target, setting) for method, volume in made.items()}
    return {"ceiling": as_published(unit[target], target, setting), "nearest": nearest, **regressions}


def linear(channels: list[np.ndarray]) -> np.ndarray:
    return np.stack([np.ones_like(channels[0]), *channels], axis=1).astype(np.float64)


def quadratic(channels: list[np.ndarray]) -> np.ndarray:
    products = [a * b for a, b in combinations_with_replacement(channels, 2)]
    return np.column_stack((linear(channels), *products))


def score(prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> tuple[float, float, float, float]:
    shown = np.where(mask, prediction.clip(0, 1), 0).astype(np.float32)
    own = normalised(np.where(mask, prediction.clip(0), 0).astype(np.float32), mask)
    scale, offset = np.polyfit(shown[mask].astype(np.float64), truth[mask].astype(np.float64), 1)
    fitted = np.where(mask, np.clip(scale * shown + offset, 0, 1), 0).astype(np.float32)
    return psnr(shown, truth, mask), psnr(own, truth, mask), psnr(fitted, truth, mask), ssim(shown, truth, mask)


def normalised(volume: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """By its 99.9 percentile among as many voxels as a BraTS volume has, whatever it was cropped to."""
    brightest = np.sort(volume[mask])[-int(0.001 * BRATS_VOXELS)]
    return (volume / brightest).clip(0, 1).astype(np.float32)


if __name__ == "__main__":
    typer.run(main)
