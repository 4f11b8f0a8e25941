"""What the weights that come with cwdm are worth; `recipes/bundled.py` makes them.

    python bundled.py compare CASES --train WORK/train   # against the nearest modality and a linear regression
    python bundled.py steps CASES WEIGHTS                # quality by sampler and steps, of a diffusion model

CASES is a folder of complete cases, such as `cwdm phantom CASES --cases 20 --seed 3003` makes; the regression of
`compare` needs the training phantoms, WORK/train, and no training: `recipes/bundled.py phantoms WORK` makes them.
Metrics are means inside the brain of the conditions, on [0, 1] by each image's own percentiles; in a second table with
the scale and offset that bring each prediction closest to the truth, since how bright an image is on [0, 1] hangs on
its few brightest voxels, which nothing in the other modalities tells. `--size` of steps cuts a cube around the tumour,
or the middle, so that a thousand steps can be afforded on a CPU.
"""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cwdm import Synthesizer
from cwdm.images import MODALITIES, MOST_SIMILAR, CaseFolder, find_cases, normalise, read_case, read_grid
from cwdm.inference import PreparedCase, draw, prepare
from cwdm.metrics import psnr, ssim
from cwdm.settings import load_settings
from cwdm.weights import BUNDLED

FIT_CASES, FIT_EVERY = 8, 50

app = typer.Typer(help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def compare(
    cases: Path,
    train: Annotated[Path, typer.Option(help="Training phantoms, for the regression.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As sampler.steps=5.")] = None,
    most: int = 20,
    weights: str = BUNDLED,
) -> None:
    """A row a modality: most similar modality, linear regression, network."""
    print_hardware()
    folders = find_cases(cases)[:most]
    synthesizer = Synthesizer(weights, load_settings(None, settings or ()), "cpu")
    training = find_cases(train)
    fits = fit_regressions(training[:: max(1, len(training) // FIT_CASES)])
    scores: dict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
    seconds = defaultdict(list)
    for folder in shown(folders, "cases"):
        volumes = {name: read_grid(path)[0] for name, path in folder.files.items()}
        units = {name: normalise(volume)[0] for name, volume in volumes.items()}
        for target in MODALITIES:
            others = [name for name in MODALITIES if name != target]
            start = time.perf_counter()
            result = synthesizer(without(folder, target))
            seconds[target].append(time.perf_counter() - start)
            *weights, constant = fits[target]
            predictions = {
                "nearest": units[MOST_SIMILAR[target]],
                "regression": np.tensordot(weights, [units[name] for name in others], 1) + constant,
                "network": normalise(result.volume)[0],
            }
            mask = np.any([volumes[name] != 0 for name in others], axis=0)
            truth = units[target]
            for name, prediction in predictions.items():
                scores[target, name].append(scored(prediction, truth, mask))
    columns = ("modality", "nearest, rescaled", "linear regression", "network")
    table, fitted_table = Table(*columns, "seconds a case"), Table(*columns, title="each fitted to the truth first")
    for target in MODALITIES:
        means = [np.mean(scores[target, name], axis=0) for name in ("nearest", "regression", "network")]
        cells = (f"{a:.2f} dB  {b:.3f}" for a, _, b in means)
        table.add_row(target, *cells, f"{mean(seconds[target]):.1f}")
        fitted_table.add_row(target, *(f"{c:.2f} dB" for _, c, _ in means))
    pipeline = synthesizer.pipeline("t1n")
    print(f"{len(folders)} cases of {cases}, {pipeline.sampler_name}, {len(pipeline.timesteps)} steps")
    Console(width=110).print(table)
    Console(width=110).print(fitted_table)


def scored(prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> tuple[float, float, float]:
    """PSNR as it comes and after the scale and offset that fit it to the truth, and SSIM, inside the mask."""
    inside = np.where(mask, np.clip(prediction, 0, 1), 0).astype(np.float32)
    return psnr(inside, truth, mask), psnr(fit_to(inside, truth, mask), truth, mask), ssim(inside, truth, mask)


def fit_to(prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The prediction with the scale and offset that bring it closest to the truth inside the mask."""
    scale, offset = np.polyfit(prediction[mask].astype(np.float64), truth[mask].astype(np.float64), 1)
    return np.where(mask, np.clip(scale * prediction + offset, 0, 1), 0).astype(np.float32)


def shown(items: list[Any], label: str) -> Iterable[Any]:
    """The items, with a progress bar on a terminal."""
    return track(items, label, console=Console(stderr=True), disable=not sys.stderr.isatty())


def without(folder: CaseFolder, target: str) -> CaseFolder:
    return replace(folder, files={name: path for name, path in folder.files.items() if name != target})


def fit_regressions(folders: list[CaseFolder]) -> dict[str, np.ndarray]:
    """Target -> weights of the other three modalities and the constant, least squares over voxels of the brain."""
    rows = []
    for folder in shown(folders, "regression"):
        volumes = np.stack([read_grid(folder.files[name])[0] for name in MODALITIES])
        inside = (volumes != 0).any(0)
        rows.append(np.stack([normalise(volume)[0][inside][::FIT_EVERY] for volume in volumes], 1))
    table = np.concatenate(rows).astype(np.float64)
    fits = {}
    for k, target in enumerate(MODALITIES):
        others = np.column_stack([np.delete(table, k, axis=1), np.ones(len(table))])
        fits[target] = np.linalg.lstsq(others, table[:, k], rcond=None)[0]
    return fits


@app.command()
def steps(
    cases: Path,
    weights: str,
    size: Annotated[int, typer.Option(help="Edge of the cube, voxels; a multiple of 8.")] = 48,
    most: Annotated[int, typer.Option(help="Leave out what takes more steps.")] = 1000,
) -> None:
    """Quality by sampler and steps: the first four cases, each without another modality."""
    print_hardware()
    plans = [("ddpm", n) for n in (50, 250, 1000)]
    plans += [(name, n) for name in ("ddim", "dpmpp") for n in (1, 2, 5, 10, 20, 50)]
    jobs = [
        cut_out(folder, target, Synthesizer(weights, device="cpu"), size)
        for folder, target in zip(find_cases(cases)[:4], MODALITIES, strict=False)
    ]
    table = Table("sampler", "steps", "PSNR dB", "SSIM", f"seconds for {size}³ voxels")
    for name, count in shown([plan for plan in plans if plan[1] <= most], "steps"):
        settings = load_settings(None, [f"sampler.name={name}", f"sampler.steps={count}"])
        synthesizer = Synthesizer(weights, settings, "cpu")
        scores, seconds = [], []
        for prepared, truth, mask in jobs:
            samples = draw(prepared, synthesizer.pipeline(prepared.case.target), settings)
            volume = np.where(mask, samples.mean.numpy(), np.float32(0))
            scores.append((psnr(volume, truth, mask), ssim(volume, truth, mask)))
            seconds.append(samples.seconds)
        a, b = mean(a for a, _ in scores), mean(b for _, b in scores)
        table.add_row(name, str(count), f"{a:.2f}", f"{b:.3f}", f"{mean(seconds):.2f}")
    Console(width=110).print(table)


def cut_out(
    folder: CaseFolder, target: str, synthesizer: Synthesizer, size: int
) -> tuple[PreparedCase, np.ndarray, np.ndarray]:
    """A cube around the tumour: the prepared case, the truth in [0, 1] and the mask of the brain."""
    prepared = prepare(read_case(without(folder, target)), synthesizer.pipeline(target), synthesizer.settings)

    def inside(volume: np.ndarray) -> np.ndarray:
        return prepared.window.crop(prepared.orientation.apply(volume))

    seg = read_grid(folder.files["t1n"].with_name(f"{folder.name}-seg.nii.gz"))[0]
    box = cube(inside(seg) > 0, size)
    truth = inside(normalise(read_grid(folder.files[target])[0])[0])
    return (
        replace(prepared, unit=prepared.unit[(..., *box)].contiguous()),
        truth[box],
        prepared.window.crop(prepared.mask)[box],
    )


def cube(tumour: np.ndarray, size: int) -> tuple[slice, ...]:
    middle = np.argwhere(tumour).mean(0) if tumour.any() else np.array(tumour.shape) / 2
    starts = [int(min(max(m - size / 2, 0), n - size)) for m, n in zip(middle, tumour.shape, strict=True)]
    return tuple(slice(start, start + size) for start in starts)


def print_hardware() -> None:
    name = torch.cpu.get_capabilities().get("cpu_name")
    print(f"{name}, {os.cpu_count()} cores, PyTorch {torch.__version__}")


if __name__ == "__main__":
    app()
