"""What a case costs in a cohort, from file to file, and what fewer steps cost in quality.

    python cohort.py                   # four phantoms, bundled weights: their own steps, fast, balanced
    python cohort.py --weights DIR --cases 16 sampler.preset=fast sampler.steps=10     # a row a setting

"alone" is a command of its own, `cwdm infer` of a single case: starting Python, loading the weights and all. "in a
cohort" is the time of all cases shared among them, with reading, sampling and writing overlapped; "busy" is the part
of it that the network was at work. PSNR and SSIM inside the brain, on [0, 1].
"""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from cwdm import Synthesizer
from cwdm.images import case_folder, find_cases, normalise, output_name, read_grid
from cwdm.inference import Outcome, synthesise_cohort
from cwdm.metrics import psnr, ssim
from cwdm.phantoms import write_phantoms
from cwdm.prepare import drop_modalities
from cwdm.settings import load_settings
from cwdm.weights import BUNDLED

SEED = 6006
ROWS = ("samples=1", "sampler.preset=fast", "sampler.preset=balanced")


def main(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    cases: Annotated[int, typer.Option(min=2)] = 4,
    weights: str = BUNDLED,
) -> None:
    """Print the table."""
    columns = ("setting", "sampler, steps", "alone", "in a cohort", "busy", "PSNR, SSIM")
    with TemporaryDirectory() as name:
        scratch = Path(name)
        write_phantoms(scratch / "complete", cases, SEED)
        drop_modalities(scratch / "complete", scratch / "input", SEED)
        rows = [measure(scratch, f"{number}", setting, weights) for number, setting in enumerate(settings or ROWS)]
    print(f"{hardware()}, PyTorch {torch.__version__}; {cases} phantoms of 240×240×155, weights {weights}; {memory()}")
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def measure(scratch: Path, name: str, setting: str, weights: str) -> list[str]:
    alone = start_for_one(scratch, name, setting, weights)
    synthesizer = Synthesizer(weights, load_settings(None, [setting, "output.intensity=unit"]))
    output = scratch / f"{name}-output"
    synthesise_cohort(find_cases(scratch / "input")[:1], synthesizer, output)  # what is lazy has happened
    start = time.perf_counter()
    outcomes = synthesise_cohort(find_cases(scratch / "input"), synthesizer, output, overwrite=True)
    seconds = time.perf_counter() - start
    faults = [outcome.reason for outcome in outcomes if outcome.status != "written"]
    if faults:
        raise SystemExit(f"not every case was written: {faults}")
    pipeline = synthesizer.pipeline(outcomes[0].modality)
    scores = [score(scratch / "complete" / outcome.case, output, outcome) for outcome in outcomes]
    busy = sum(outcome.seconds for outcome in outcomes) / seconds
    quality = f"{mean(a for a, _ in scores):.2f} dB, {mean(b for _, b in scores):.3f}"
    a_case = seconds / len(outcomes)
    return [
        setting,
        f"{pipeline.sampler_name}, {len(pipeline.timesteps)}",
        f"{alone:.1f} s",
        f"{a_case:.2f} s",
        f"{100 * busy:.0f} %",
        quality,
    ]


def start_for_one(scratch: Path, name: str, setting: str, weights: str) -> float:
    """Seconds that a command for the first case takes."""
    data, output = scratch / f"{name}-one", scratch / f"{name}-one-output"
    data.mkdir()
    first = sorted((scratch / "input").iterdir())[0]
    (data / first.name).symlink_to(first)
    paths = ["--data_path", str(data), "--output_path", str(output), "--weights", weights]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "cwdm", "infer", *paths, setting], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def score(truth: Path, output: Path, outcome: Outcome) -> tuple[float, float]:
    files = case_folder(truth).files
    target = normalise(read_grid(files.pop(outcome.modality))[0])[0]
    mask = np.any([read_grid(path)[0] != 0 for path in files.values()], axis=0)
    result = read_grid(output / output_name(outcome.case, outcome.modality))[0]
    return psnr(result, target, mask), ssim(result, target, mask)


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.cpu.get_capabilities().get('cpu_name')}, {os.cpu_count()} cores"


def memory() -> str:
    """The most that the cohorts took."""
    gib = f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    return (
        f"{gib}, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of the GPU" if torch.cuda.is_available() else gib
    )


if __name__ == "__main__":
    typer.run(main)
