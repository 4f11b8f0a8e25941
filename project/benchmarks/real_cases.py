"""Do real cases go through the whole program with full-size networks?

    python real_cases.py CASES [--steps 4]

CASES is a folder of complete cases. From each, every modality is taken away in turn; `cwdm infer` synthesises it with
weights of the published layout and size (81.5 M parameters, untrained, so the images mean nothing), and the file it
writes is opened with nibabel and held against the geometry of the case.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cwdm.images import MODALITIES, CaseFolder, find_cases, output_name
from cwdm.unet import UNetConfig
from cwdm.weights import PUBLISHED_FILES, untrained_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    table = Table("case", "missing", "seconds", "geometry", "values")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        weights = write_weights(scratch / "weights")
        for case in find_cases(arguments.cases):
            for missing in MODALITIES:
                table.add_row(*run(case, missing, weights, scratch / f"{case.name}-{missing}", arguments.steps))
    Console().print(table)
    if "DIFFERS" in table.columns[3].cells:
        raise SystemExit(1)


def write_weights(folder: Path) -> Path:
    folder.mkdir()
    first = folder / PUBLISHED_FILES["t1n"]
    torch.save(untrained_state(UNetConfig(in_channels=32)), first)
    for name in PUBLISHED_FILES.values():
        if name != first.name:
            (folder / name).symlink_to(first)
    return folder


def run(case: CaseFolder, missing: str, weights: Path, scratch: Path, steps: int) -> tuple[str, ...]:
    folder = scratch / "input" / case.name
    folder.mkdir(parents=True)
    for modality, path in case.files.items():
        if modality != missing:
            (folder / path.name).symlink_to(path.resolve())
    start = time.perf_counter()
    paths = ["--data_path", folder.parent, "--output_path", scratch / "output", "--weights", weights]
    timesteps = f"sampler.timesteps={list(range(steps - 1, -1, -1))}"
    subprocess.run([sys.executable, "-m", "cwdm", "infer", *paths, timesteps], check=True)
    seconds = time.perf_counter() - start
    (written,) = (scratch / "output").iterdir()
    assert written.name == output_name(case.name, missing), written
    image, condition = nib.load(written), nib.load(next(iter(folder.iterdir())))
    same = image.shape == condition.shape and np.allclose(image.affine, condition.affine)
    data = np.asarray(image.dataobj)
    values = f"{data.dtype} {data.min():g} to {data.max():g}"
    return case.name, missing, f"{seconds:.0f}", "as the case" if same else "DIFFERS", values


if __name__ == "__main__":
    main()
